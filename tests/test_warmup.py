"""Kernels compiled ahead: exactly those that calls then take from the cache."""

import os
import re
import sys
import types

import numpy as np
import pytest

import nbbn
from nbbn import BatchNormalization
from nbbn.__main__ import main
from nbbn.compat import v1
from nbbn.deploy import warming
from nbbn.deploy.needed import kernels
from nbbn.engine.cpu import engine, plan
from tests.helpers.processes import check, run

SMALL, LARGE = (6, 4, 5, 8), (4, 8, 128, 64)  # one thread; several, where there are several


@pytest.fixture
def asked_for(monkeypatch):
    """The kernels that calls ask for; none is compiled or run."""
    found = []

    def compiled(*variant):
        found.append(variant)

        def kernel(*arguments):
            pass

        kernel.overloads = {None: types.SimpleNamespace(entry_point=kernel)}
        return kernel

    for module in (plan, engine):
        monkeypatch.setattr(module, "compiled", compiled)
    return found


def adjustment(shape):
    return np.ones(shape[-1]), np.zeros((shape[0],) + (1,) * (len(shape) - 1))


LAYERS = {
    "plain": {},
    "channels first": {"axis": 1},
    "several axes": {"axis": [1, 3]},
    "relu": {"activation": "relu"},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": lambda: 3.0}},
    "virtual batch": {"virtual_batch_size": 2},
    "adjustment": {"adjustment": adjustment},
    "adjustment and relu": {"adjustment": adjustment, "activation": "relu"},
    "cumulative average": {"momentum": None},
    "averages": {"momentum": lambda: 0.5, "debias": True, "skip_nonfinite": True},
    "frozen": {"trainable": False},
    "no parameters": {"scale": False, "center": False},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "float64": {"dtype": "float64"},
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the results are whatever was in memory
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
def test_what_is_planned_is_what_calls_ask_for(options, shape, training, gradients, asked_for):
    for residual in (False, True):
        for mask in (None, np.ones(shape[0], bool).reshape(-1, *[1] * (len(shape) - 1))):
            layer = BatchNormalization(**options)
            planned = kernels(layer, shape, training=training, gradients=gradients, mask=mask, residual=residual)
            assert asked_for == []  # planning compiles nothing
            x = np.zeros(shape, layer.dtype or np.float32)
            operands = {"training": training, "mask": mask, "residual": x.copy() if residual else None}
            if gradients:
                layer.vjp(x, **operands)[1](x)
            else:
                layer(x, **operands)
            assert set(planned) == set(asked_for)
            asked_for.clear()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_planning_asks_no_schedule(asked_for):
    clips = {name: lambda: pytest.fail("was asked") for name in ("rmax", "rmin", "dmax")}
    momenta = dict.fromkeys(("momentum", "renorm_momentum"), clips["rmax"])
    assert kernels(BatchNormalization(**momenta, renorm=True, renorm_clipping=clips), SMALL, training=True)
    assert asked_for == []


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_planned_for_inputs_that_must_be_copied(asked_for):
    shape, layer = (3, 4, 3, 4, 3, 4), BatchNormalization(axis=[1, 3, 5])
    planned = kernels(layer, shape, training=True, gradients=True)
    layer.vjp(np.zeros(shape, np.float32), training=True)[1](np.zeros(shape, np.float32))
    assert set(planned) == set(asked_for)


def test_threads_need_no_kernel_of_their_own():
    """Steps are the same for one thread and for several, but for the number of passes."""
    layer = BatchNormalization()
    for parallel in (True, False):
        nbbn.force(layer, parallel=parallel)
        assert [k[0] for k in kernels(layer, SMALL, training=True, gradients=True)] == ["train", "backward"]


# --- nothing else happens -------------------------------------------------------------------


@pytest.fixture
def compiles_nothing(monkeypatch):
    """warmup() without its compilations, and with a cache."""
    monkeypatch.setattr(warming, "compiled", lambda *variant: None)
    monkeypatch.setattr(warming, "cache_folder", lambda: "a folder")


EVERYTHING = {"training": True, "gradients": True, "residual": True}


@pytest.mark.usefixtures("compiles_nothing")
@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"momentum": None}], ids=str)
def test_a_built_layer_stays_as_it_is(options):
    layer = BatchNormalization(**options)
    layer.build(SMALL)
    layer.set_weights([np.random.default_rng(0).uniform(1, 2, w.shape) for w in layer.weights])
    weights, state, used = layer.get_weights(), layer._variables.state, layer._dispatcher
    nbbn.warmup(layer, SMALL, **EVERYTHING)
    assert layer._variables.state is state
    assert layer._dispatcher is used
    for before, after in zip(weights, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.usefixtures("compiles_nothing")
def test_a_layer_that_is_not_built_stays_so():
    def initializer(shape, dtype):
        raise AssertionError("called")

    layer = BatchNormalization(gamma_initializer=initializer)
    nbbn.warmup(layer, SMALL, **EVERYTHING)
    assert not layer.built
    assert layer.weights == []


@pytest.mark.usefixtures("compiles_nothing")
def test_a_graph_stays_empty():
    layer = v1.layers.BatchNormalization()
    nbbn.warmup(layer, SMALL, **EVERYTHING)
    assert not layer.built
    assert layer.updates == []
    assert v1.get_collection(v1.GraphKeys.GLOBAL_VARIABLES) == []
    assert v1.get_collection(v1.GraphKeys.UPDATE_OPS) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not count touched pages this way")
def test_arrays_take_address_space_only():
    code = """
import resource, sys, nbbn
from nbbn.deploy.needed import kernels
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
kernels(nbbn.BatchNormalization(), (4, 8), training=True, gradients=True)
before = peak()
kernels(nbbn.BatchNormalization(), (1 << 20, 256), training=True, gradients=True, residual=True)
print(peak() - before)
"""
    assert int(check(code, NBBN_RECYCLE_BYTES="0")) < 1 << 28  # a quarter of one of the arrays


# --- layers and shapes ----------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch, compiles_nothing):
    found = []
    monkeypatch.setattr(warming, "kernels", lambda layer, shape, **options: found.append((layer.name, shape)) or {})
    return found


def test_layers_and_shapes_are_paired(calls):
    a, b = BatchNormalization(name="a"), BatchNormalization(name="b")
    nbbn.warmup(a, (1, 2))
    nbbn.warmup(a, [(1, 2), [3, 4]])
    nbbn.warmup([a, b], (1, 2))
    nbbn.warmup([a, b], [(1, 2), (3, 4)])
    one, two = (1, 2), (3, 4)
    assert calls == [("a", one), ("a", one), ("a", [3, 4]), ("a", one), ("b", one), ("a", one), ("b", two)]


LAYER = BatchNormalization(axis=3)
WRONG = [
    ((LAYER, (8, 0, 4, 4)), ValueError, r"a shape must be .* received \(8, 0, 4, 4\)"),
    ((LAYER, (None, 8, 8, 4)), ValueError, r"a shape must be .* received \(None, 8, 8, 4\)"),
    ((LAYER, (8.0, 8)), ValueError, r"a shape must be .* received \(8.0, 8\)"),
    ((LAYER, ()), ValueError, r"shapes must be .* received \(\)"),
    ((LAYER, 8), ValueError, r"shapes must be .* received 8"),
    ((LAYER, "8,8"), ValueError, r"shapes must be .* received '8,8'"),
    ((LAYER, (8, 8)), ValueError, r"axis must be .* received 3"),
    (([LAYER] * 2, [(8, 8, 8, 8)] * 3), ValueError, "as many as the layers, 2; received 3"),
    (([], (8, 8)), ValueError, "as many as the layers, 0; received 1"),
    (("layer", (8, 8)), TypeError, "layers must be .* received 'l'"),
    ((5, (8, 8)), TypeError, "layers must be .* received 5"),
]


@pytest.mark.usefixtures("compiles_nothing")
@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_what_is_no_layer_or_shape(arguments, error, message):
    with pytest.raises(error, match=message):
        nbbn.warmup(*arguments)


@pytest.mark.usefixtures("compiles_nothing")
def test_errors_of_calls_are_those_of_warmup():
    built = BatchNormalization()
    built.build((None, 8))
    with pytest.raises(ValueError, match=r"\(any, 8\).*received \(4, 9\)"):
        nbbn.warmup(built, (4, 9))
    with pytest.raises(TypeError, match=r"dtype must be one of .* received 'int32'"):
        nbbn.warmup(built, (4, 8), dtype="int32")
    with pytest.raises(ValueError, match=r"virtual_batch_size=4 must divide .* 6 samples"):
        nbbn.warmup(BatchNormalization(virtual_batch_size=4), (6, 8), training=True)


# --- the cache ------------------------------------------------------------------------------

SHAPE = (300, 1024)  # enough for two threads
CALLS = f"""
import numba, numpy as np, nbbn
from nbbn.runtime import parallel_region
from numba.np.ufunc import parallel as numba_pool
from tests.helpers.processes import in_child

layer = nbbn.BatchNormalization(activation="relu")

def call(training):
    x = np.ones({SHAPE}, np.float32)
    layer(x, training=training)
    with parallel_region():  # whoever is inside runs alone
        layer(x, training=training)
"""


def python(folder, code):
    """What `code` printed, with this cache and, if the system allows it, two threads."""
    return check(CALLS + code, timeout=120, NUMBA_NUM_THREADS="2", NBBN_CACHE_DIR=str(folder))


def warmup(folder, *arguments, code="", **variables):
    """The finished process of the command."""
    code += f"import sys; from nbbn.__main__ import main; sys.exit(main(['warmup', *{arguments}]))"
    variables = {"NUMBA_NUM_THREADS": "2", "NBBN_CACHE_DIR": str(folder), **variables}
    return run(code, timeout=120, **variables)


def unused(folder):
    """The kernels in the cache, marked as never loaded."""
    files = sorted(folder.glob("*.kernel"))
    for file in files:
        os.utime(file, (0, 0))
    return files


def assert_used(folder, files):
    """Each of these kernels was taken from the cache, and no other was compiled."""
    assert sorted(folder.glob("*.kernel")) == files
    assert all(file.stat().st_mtime > 0 for file in files)


def test_the_command_compiles_exactly_what_calls_use(tmp_path):
    arguments = ["--shape", ",".join(map(str, SHAPE)), "--modes", "training", "--activation", "relu"]
    done = warmup(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    files = unused(tmp_path)
    assert re.fullmatch(
        rf"kernels: {len(files)}, already cached: 0, seconds: \d+\.\d, folder: {re.escape(str(tmp_path))}\n",
        done.stdout,
    )
    python(tmp_path, "call(training=True)")
    assert_used(tmp_path, files)
    again = warmup(tmp_path, *arguments)
    assert again.stdout.startswith(f"kernels: {len(files)}, already cached: {len(files)}, ")


def test_the_function_leaves_a_thread_pool_to_children(tmp_path):
    """It compiles exactly what calls use, too; here those of a forked child."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    code = f"nbbn.warmup(layer, {SHAPE})\nassert not numba_pool._is_initialized\n"
    python(tmp_path, code)
    files = unused(tmp_path)
    python(tmp_path, f"{code}assert not layer.built\nin_child(lambda: call(training=False))\n")
    assert_used(tmp_path, files)


def test_without_a_cache_the_command_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    for name, why in (("", "NBBN_CACHE_DIR is empty"), (tmp_path / "file", f"{tmp_path / 'file'} cannot be made")):
        done = warmup(name)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.splitlines()[-1].startswith(f"there is no kernel cache ({why}")


def test_without_a_cache_the_function_says_so(monkeypatch):
    monkeypatch.setattr(warming, "cache_folder", lambda: None)
    with pytest.raises(RuntimeError, match="there is no kernel cache"):
        nbbn.warmup(LAYER, (4, 4, 4, 4))


def test_a_full_disk(tmp_path):
    code = """
from nbbn.runtime import cache
def write(*arguments):
    raise OSError(28, "No space left on device")
cache.os.replace = write
"""
    done = warmup(tmp_path, "--shape", "4,3", "--modes", "inference", code=code)
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]  # without tqdm, lines of progress come first
    assert last == f"kernels could not be written to {tmp_path}: is the disk full?"


# --- the command ----------------------------------------------------------------------------


@pytest.fixture
def compiled_by_command(monkeypatch, tmp_path):
    """The kernels that the command compiles, without doing it."""
    found = []

    class Compiled:
        stats = types.SimpleNamespace(cache_hits={})

        def __init__(self, *variant):
            found.append(variant)
            (tmp_path / f"{len(found)}.kernel").touch()

    monkeypatch.setattr(warming, "compiled", Compiled)
    monkeypatch.setattr(warming, "cache_folder", lambda: tmp_path)
    return found


def test_the_default(compiled_by_command):
    """Three modes of three kinds of inputs, small and large."""
    assert main(["warmup"]) == 0
    assert {k[0] for k in compiled_by_command} == {"infer", "train", "backward"}
    assert {k[1] for k in compiled_by_command} == {"planes", "rows"}
    assert len(set(compiled_by_command)) == len(compiled_by_command) <= 9


def test_options_of_the_command(compiled_by_command):
    def variants(*arguments):
        compiled_by_command.clear()
        assert main(["warmup", *arguments]) == 0
        return set(compiled_by_command)

    def of_layer(shape, axis=-1, activation=None, renorm=False, **call):
        return set(kernels(BatchNormalization(axis, activation=activation, renorm=renorm), shape, **call))

    small = of_layer((4, 3))
    assert variants("--shape", "4,3", "--modes", "inference") == small
    assert variants("--shape", "4,3") == of_layer((4, 3), training=True, gradients=True) | small
    assert variants("--shape", "4,3", "9,8,40,40", "--axis", "1", "--modes", "inference") == small | of_layer(
        (9, 8, 40, 40), axis=1
    )
    assert variants("--shape", "3,4,5,6", "--axis=-3,-1", "--modes", "training") == of_layer(
        (3, 4, 5, 6), axis=[1, 3], training=True
    )
    assert variants("--shape", "4,3", "--modes", "inference,training", "--dtype", "float16,float64") == {
        *of_layer((4, 3), dtype="float16"),
        *of_layer((4, 3), dtype="float16", training=True),
        *of_layer((4, 3), dtype="float64"),
        *of_layer((4, 3), dtype="float64", training=True),
    }
    options = ("--renorm", "--residual", "--activation", "relu")
    assert variants("--shape", "4,3", "--modes", "training", *options) == of_layer(
        (4, 3), activation="relu", renorm=True, residual=True, training=True
    )


def test_without_tqdm_there_are_plain_lines(compiled_by_command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["warmup", "--shape", "4,3", "--modes", "inference,training"]) == 0
    assert capsys.readouterr().err == "1/2: infer, rows\n2/2: train, rows\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "4;3"], "--shape: must be integers with commas between; received '4;3'"),
        (["--shape", "4,0"], "positive integers; received (4, 0)"),
        (["--shape", "4,3", "--axis", "2"], "axis must be between -2 and 1 for an input of rank 2; received 2"),
        (["--axis", "1"], "axis is that of --shape, which is missing; received (1,)"),
        (["--dtype", "float32,int8"], "--dtype: must be some of float16,bfloat16,float32,float64; received 'float32,i"),
        (["--modes", "train"], "--modes: must be some of inference,training,gradients; received 'train'"),
        (["--activation", "tanh"], "'tanh'"),
    ],
)
def test_what_the_command_cannot_do(arguments, message, compiled_by_command, capsys):
    try:
        code = main(["warmup", *arguments])
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    assert (code, printed.out, compiled_by_command) == (2, "", [])
    assert message in printed.err
