"""Names, configs and errors that initializers, regularizers and constraints share."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest

from nbbn import constraints, initializers, regularizers

MODULES = [initializers, regularizers, constraints]

CLASSES = {
    initializers: [
        "Zeros zeros",
        "Ones ones",
        "Constant constant",
        "RandomNormal random_normal",
        "RandomUniform random_uniform",
        "TruncatedNormal truncated_normal",
        "VarianceScaling variance_scaling",
        "GlorotNormal glorot_normal",
        "GlorotUniform glorot_uniform",
        "HeNormal he_normal",
        "HeUniform he_uniform",
        "LecunNormal lecun_normal",
        "LecunUniform lecun_uniform",
    ],
    regularizers: ["L1 l1", "L2 l2", "L1L2 l1_l2"],
    constraints: ["MaxNorm max_norm", "NonNeg non_neg", "UnitNorm unit_norm", "MinMaxNorm min_max_norm"],
}
NAMES = [(module, *pair.split()) for module, pairs in CLASSES.items() for pair in pairs]

# Objects whose every argument differs from its default.
OBJECTS = [
    (initializers, initializers.Constant(2.5)),
    (initializers, initializers.Constant([1.0, 2.0])),
    (initializers, initializers.RandomNormal(1.0, 2.0, seed=3)),
    (initializers, initializers.RandomUniform(-2.0, 2.0, seed=3)),
    (initializers, initializers.TruncatedNormal(1.0, 2.0, seed=3)),
    (initializers, initializers.VarianceScaling(2.0, "fan_avg", "uniform", 3, [0], [1])),
    (initializers, initializers.HeNormal(3, [0], [1])),
    (regularizers, regularizers.L1(0.5)),
    (regularizers, regularizers.L2(0.5)),
    (regularizers, regularizers.L1L2(0.5, 0.25)),
    (constraints, constraints.MaxNorm(3.0, [0, 1])),
    (constraints, constraints.UnitNorm(1)),
    (constraints, constraints.MinMaxNorm(0.5, 2.0, 0.5, None)),
]
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
each_object = pytest.mark.parametrize(("module", "component"), OBJECTS, ids=lambda value: repr(value)[:40])


def make_values(shape, dtype=None):
    """A plain function, as a user may pass one."""
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(("module", "class_name", "snake_name"), NAMES)
def test_both_names_give_the_class(module, class_name, snake_name):
    cls = getattr(module, class_name)
    assert type(module.get(class_name)) is cls
    assert type(module.get(snake_name)) is cls
    assert isinstance(getattr(module, snake_name)(), cls)


@pytest.mark.parametrize(
    ("module", "alias", "class_name"),
    [
        (initializers, "zero", "Zeros"),
        (initializers, "one", "Ones"),
        (initializers, "normal", "RandomNormal"),
        (initializers, "uniform", "RandomUniform"),
        (constraints, "maxnorm", "MaxNorm"),
        (constraints, "nonneg", "NonNeg"),
        (constraints, "unitnorm", "UnitNorm"),
    ],
)
def test_old_alias_gives_the_class(module, alias, class_name):
    assert type(module.get(alias)) is getattr(module, class_name)


@each_object
def test_config_survives_json_and_makes_an_equal_object(module, component):
    config = json.loads(json.dumps(module.serialize(component)))
    assert set(config) == {"class_name", "config"}
    again = module.get(config)
    assert again == component
    assert again is not component
    assert hash(again) == hash(component)
    assert type(component).from_config(component.get_config()) == component


@each_object
def test_different_config_or_class_compares_unequal(module, component):
    assert component != type(component)()
    assert component != repr(component)


def test_equal_arguments_of_different_classes_compare_unequal():
    assert initializers.HeNormal(seed=1) != initializers.HeUniform(seed=1)
    assert constraints.UnitNorm(0) != constraints.NonNeg()


@each_object
def test_repr_shows_every_argument(module, component):
    namespace = {type(component).__name__: type(component)}
    assert eval(repr(component), namespace) == component


@each_object
def test_config_is_a_copy(module, component):
    before = json.dumps(module.serialize(component))
    for value in component.get_config().values():
        if isinstance(value, list):
            value.append(99)
    assert json.dumps(module.serialize(component)) == before


@pytest.mark.parametrize("keras_module", ["keras.{}s", "tf_keras.{}s", "tensorflow.keras.{}s"])
@each_object
def test_long_config_of_keras_is_read(module, component, keras_module):
    kind = module.__name__.removeprefix("nbbn.").removesuffix("s")
    long = {**module.serialize(component), "module": keras_module.format(kind), "registered_name": None}
    copy = json.loads(json.dumps(long))
    assert module.get(long) == component
    assert long == copy


@each_module
def test_foreign_module_in_a_config_is_refused(module):
    name = CLASSES[module][0].split()[0]
    config = {
        "module": "my_project",
        "class_name": name,
        "config": {},
        "registered_name": "my_project>" + name,
    }
    with pytest.raises(ValueError, match="my_project"):
        module.get(config)
    with pytest.raises(ValueError, match="make_values"):
        module.get({"module": "builtins", "class_name": "function", "config": "make_values"})


@each_module
def test_class_object_and_function_are_taken_as_they_are(module):
    cls = getattr(module, CLASSES[module][0].split()[0])
    instance = cls()
    assert module.get(cls) == instance
    assert module.get(instance) is instance
    assert module.get(make_values) is make_values


@each_module
def test_function_and_class_serialize_to_their_name(module):
    assert module.serialize(make_values) == "make_values"
    with pytest.raises(ValueError, match=r"must be one of the names .* 'make_values'"):
        module.get(module.serialize(make_values))
    cls = getattr(module, CLASSES[module][0].split()[0])
    assert module.get(module.serialize(cls)) == cls()


@each_module
def test_a_function_that_has_the_name_of_another_cannot_be_serialized(module):
    """Its name would be read as the other."""
    cls, snake_name = CLASSES[module][0].split()

    def namesake(*args):
        return make_values(*args)

    for name in (cls, snake_name):
        namesake.__name__ = name
        with pytest.raises(ValueError, match=f"a name of its own.*{name}"):
            module.serialize(namesake)


@each_module
def test_foreign_object_serializes_by_its_config(module):
    class Foreign:
        def __call__(self, *args, **kwargs):
            raise AssertionError("serialize must not call the object")

        def get_config(self):
            return {"level": 3}

    assert module.serialize(Foreign()) == {"class_name": "Foreign", "config": {"level": 3}}


@each_module
@pytest.mark.parametrize("nameless", [functools.partial(make_values, dtype="float32"), lambda shape: None])
def test_nameless_object_cannot_be_serialized(module, nameless):
    with pytest.raises(ValueError, match=r"get_config.*(partial|lambda)"):
        module.serialize(nameless)


@each_module
def test_unknown_name_lists_the_known_ones(module):
    with pytest.raises(ValueError, match=r"must be one of the names .* 'zeroes'") as caught:
        module.get("zeroes")
    for pair in CLASSES[module]:
        class_name, snake_name = pair.split()
        assert f" {class_name}" in str(caught.value)
        assert f" {snake_name}" in str(caught.value)


@pytest.mark.parametrize(
    "identifier",
    [3, 1.5, ["zeros"], {}, {"class_name": None}, {"config": {}}, {"class_name": "L1", "config": 3}],
)
@each_module
def test_what_is_no_identifier_is_refused_with_the_value(module, identifier):
    received = "3" if identifier == {"class_name": "L1", "config": 3} else repr(identifier)
    with pytest.raises(ValueError, match="received") as caught:
        module.get(identifier)
    assert received in str(caught.value)


def test_unknown_argument_in_a_config_is_refused():
    for module, name in [(initializers, "Constant"), (regularizers, "l1_l2"), (constraints, "MaxNorm")]:
        with pytest.raises(ValueError, match=f"config of gamma_thing '{name}' .* keys .*levle"):
            module.get({"class_name": name, "config": {"levle": 3}}, "gamma_thing")


def test_a_config_that_must_be_empty():
    with pytest.raises(ValueError, match=r"config of initializer 'Ones' must be empty, received"):
        initializers.get({"class_name": "Ones", "config": {"level": 3}})


def test_numpys_ones_are_the_ones_of_that_name():
    assert initializers.get(initializers.serialize(np.ones)) == initializers.Ones()


def test_none_stays_none_where_there_may_be_nothing():
    assert regularizers.get(None) is None
    assert constraints.get(None) is None
    assert [module.serialize(None) for module in MODULES] == [None, None, None]
    with pytest.raises(ValueError, match="received None"):
        initializers.get(None)


@pytest.mark.parametrize("name", ["Initializer", "RandomInitializer", "_NamedScaling"])
def test_base_class_is_no_name(name):
    assert hasattr(initializers, name)
    with pytest.raises(ValueError, match="initializer must be one of the names"):
        initializers.get(name)


def test_no_framework_is_imported():
    code = (
        "import sys; from nbbn import initializers, regularizers, constraints;"
        "initializers.initialize('he_normal', (3,)); regularizers.gradient(regularizers.L1(), [1.0]);"
        "print([name for name in ('tensorflow', 'keras', 'tf_keras', 'torch', 'jax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
