"""The rooms of nbbn/, and who may import from whom: a module imports from rooms below its own only.

Read from the text, not from what happens to be imported: a lazy import inside a function counts like any other.
"""

import sys

import pytest

from tests.helpers.imports import (
    IMPORTS,
    MODULES,
    PACKAGE,
    hidden_imports,
    imports_of_text,
    is_in,
    own_imports,
    reachable,
)
from tests.helpers.processes import check

# From the ground up: each room, and what its modules may import beside their own room. A name stands for all that is in
# it; a module belongs to the longest name that matches. "nbbn" is the face, nbbn/__init__.py.
ROOMS = {
    # -- the ground: numbers and names
    "core": set(),
    "runtime": {"core"},
    "_registry": set(),
    "__pyinstaller": set(),
    "initializers": {"_registry"},
    "regularizers": {"_registry"},
    "constraints": {"_registry"},
    # -- what is compiled; two targets that do not know each other
    "kernels": {"core.rules"},
    "kernels.cpu": {"core.rules", "kernels", "runtime"},
    "kernels.cuda": {"core.rules", "kernels"},
    "streams": {"kernels.cuda", "runtime"},
    # -- where arrays lie: one face, and for each library a module that only `libraries` looks for
    "arrays.availability": set(),
    "arrays.device": {"core"},
    "arrays.dlpack": {"core"},
    "arrays.torch": {"arrays.device", "core"},
    "arrays.cupy": {"arrays.device", "core"},
    "arrays.moving": {"arrays.device", "core", "kernels.cuda", "streams"},
    "arrays.numba_cuda": {"arrays.device", "arrays.moving", "core", "kernels.cuda"},
    "arrays.jax": {"arrays.device", "arrays.numba_cuda", "core"},
    "arrays.interface": {"arrays.device", "arrays.dlpack", "arrays.numba_cuda", "core"},
    "arrays.libraries": {
        *("arrays.availability", "arrays.torch", "arrays.cupy", "arrays.jax", "arrays.numba_cuda"),
        "arrays.interface",
    },
    "arrays.host": {"arrays.libraries", "core", "runtime"},
    "arrays.gpu": {"arrays.device", "arrays.host", "arrays.libraries", "arrays.moving", "core"},
    "arrays": {"arrays.gpu", "arrays.host", "arrays.libraries", "core"},
    # -- what a layer owns
    "state": {"arrays", "core", "runtime"},
    # -- how steps run; here, too, two targets that do not know each other
    "engine": {"arrays", "core", "kernels"},
    "engine.cpu": {"core", "engine", "kernels", "kernels.cpu", "runtime"},
    "engine.cuda": {
        *("arrays.availability", "arrays.device", "arrays.moving", "core", "engine", "kernels"),
        *("kernels.cuda", "streams"),
    },
    "engine.dispatcher": {"arrays", "core", "engine", "engine.cpu", "engine.cuda", "kernels"},
    # -- a call: checks, the steps, the gradient
    "call": {"arrays", "core", "engine", "engine.cpu", "engine.dispatcher", "kernels", "runtime", "state"},
    # -- the faces
    "layer": {
        *(
            "arrays",
            "arrays.availability",
            "arrays.gpu",
            "arrays.libraries",
            "call",
            "core",
            "engine.dispatcher",
            "state",
        ),
        *("initializers", "regularizers", "constraints"),
    },
    "nn": {"arrays", "call", "core", "engine.dispatcher", "kernels"},
    "numba": {"arrays.host", "core", "engine", "engine.cpu", "engine.dispatcher", "kernels", "kernels.cpu", "runtime"},
    "deploy": {
        *("call", "core", "engine", "engine.cpu", "engine.dispatcher"),
        *("kernels.cpu", "layer", "runtime", "state"),
    },
    "exchange": {"arrays", "core", "layer", "state"},
    "accumulation": {"arrays", "call", "core", "engine.cpu", "kernels", "layer"},
    "sync": {"arrays", "call", "core", "engine.dispatcher", "layer", "runtime"},
    "moments": {"arrays", "call", "core", "engine.cpu", "engine.dispatcher", "kernels", "state"},
    "population": {
        *("arrays", "call", "core", "engine.cpu", "engine.dispatcher", "kernels", "layer", "runtime", "state"),
        "sync",
    },
    "nbbn": {
        *("accumulation", "call", "core", "deploy", "engine", "engine.dispatcher", "exchange", "layer", "nn"),
        *("moments", "population", "runtime", "sync"),
        *("initializers", "regularizers", "constraints"),
    },
    "torch": {
        *("accumulation", "arrays", "arrays.host", "call", "core", "engine", "engine.dispatcher", "kernels", "runtime"),
        "sync",
    },
    "compat": {"arrays", "call", "core", "layer", "regularizers", "runtime", "state"},
    "jax": {
        *("arrays.availability", "arrays.device", "core", "engine", "engine.cpu", "engine.dispatcher"),
        *("kernels", "kernels.cpu", "runtime"),
    },
    "flax": {"core", "jax"},
    "keras": {"call", "core", "engine", "engine.dispatcher", "jax", "kernels", "torch"},
    "demo": {"nbbn", "runtime"},
    "info": {"arrays.availability", "kernels.cpu", "nbbn", "runtime"},
    "__main__": {"core", "demo", "deploy", "info", "nbbn"},
}
FILES = {"__init__.py", "__main__.py", "_registry.py", "accumulation.py", "info.py", "nn.py"} | {
    *("constraints.py", "initializers.py", "moments.py", "population.py", "regularizers.py"),
}
FOLDERS = {
    *("__pyinstaller", "arrays", "call", "compat", "core", "demo", "deploy"),
    *("engine", "exchange", "flax", "jax", "keras", "kernels", "layer", "numba", "runtime", "state", "streams", "sync"),
    "torch",
}

ALWAYS_INSTALLED = {"numba", "numpy", "llvmlite"}
# What else a room may import, and only inside a function.
OPTIONAL = {
    "core": {"ml_dtypes"},
    "layer": {"safetensors"},
    "exchange": {"h5py", "onnx"},
    "deploy": {"tqdm"},
    "population": {"tqdm"},
    "info": {"ml_dtypes"},
    "demo": {"matplotlib", "sklearn", "threadpoolctl", "tqdm"},
    "streams": {"cuda"},
    "sync": {"mpi4py", "torch"},
}
# These are imported when an array of their library comes in, and not before; so they may import it at once.
LIBRARIES = {"arrays.torch": "torch", "arrays.cupy": "cupy", "arrays.jax": "jax"}
# Whoever imports one of these rooms has the framework: it may be imported at once.
FACES = {
    **{"jax": {"jax"}, "flax": {"flax", "jax"}, "torch": {"torch"}},
    "keras": {"keras", "tensorflow", "torch"},
}
# What imports numba.cuda is imported when it is needed, too.
OF_A_GPU = (
    *("kernels.cuda", "streams", "engine.cuda", "arrays.gpu", "arrays.interface", "arrays.moving", "arrays.numba_cuda"),
    *LIBRARIES,
)


EVERY_MODULE = pytest.mark.parametrize("module", list(MODULES))


def room_of(module):
    """The longest matching name; None for a module that nobody has placed."""
    return max((room for room in ROOMS if is_in(module, room)), key=len, default=None)


# -- that these tests see what there is -----------------------------------------------------------------------------


EVERY_KIND = """
import a.b as c, d
from e import f, g as h
try:
    import i
except ImportError:
    i = None
if TYPE_CHECKING:
    from j import k
class C:
    import l
    def method(self, value=importlib.import_module("m")):
        import n
        if value:
            with value:
                from o.p import q
        return lambda: __import__("r")
async def later():
    def inner():
        return importlib.import_module("s.t")
"""


def test_every_kind_of_import_is_seen():
    found = imports_of_text(EVERY_KIND)
    assert [n for n, at_import in found if at_import] == ["a.b", "d", "e.f", "e.g", "i", "l", "m"]
    assert [n for n, at_import in found if not at_import] == ["j.k", "n", "o.p.q", "r", "s.t"]
    assert hidden_imports(EVERY_KIND) == []


@pytest.mark.parametrize(
    "text",
    [
        "importlib.import_module(name)",
        "importlib.import_module(f'nbbn.{name}')",
        "importlib.import_module('.a', 'nbbn')",
        "importlib.import_module(name='a')",
        "__import__(name)",
        "load = importlib.import_module",
        "map(import_module, names)",
        "from importlib import import_module as load",
        "builtins.__import__(name)",
        "exec('import a')",
    ],
)
def test_every_hidden_import_is_seen(text):
    assert hidden_imports(text) == [1]


LOADED = "import sys, nbbn, nbbn.compat.v1; print(*sys.modules)"


@pytest.fixture(scope="module")
def loaded():
    """What is in a fresh process after the import of both faces."""
    return set(check(LOADED).split())


def test_what_is_read_is_what_happens(loaded):
    """The modules that the text says are imported at once are those that are. No package brings others with it."""
    expected, waiting = set(), ["nbbn", "compat.v1"]
    while waiting:
        module = waiting.pop()
        if module not in expected:
            expected.add(module)
            parents = [module.rsplit(".", n)[0] for n in range(1, module.count(".") + 1)]
            waiting += [*own_imports(module, only_at_import=True), *parents]
    assert {m.removeprefix("nbbn.") for m in loaded if is_in(m, "nbbn")} == expected


# -- the rooms ------------------------------------------------------------------------------------------------------


def test_what_is_on_the_top_level():
    names = {path.name for path in PACKAGE.iterdir()} - {"__pycache__", "py.typed"}
    assert names == FILES | FOLDERS


def test_every_module_is_in_a_room():
    assert [m for m in MODULES if room_of(m) is None] == []


def test_every_name_has_a_module():
    """Or it is misspelt."""
    names = [*ROOMS, *(n for allowed in ROOMS.values() for n in allowed), *LIBRARIES, *OF_A_GPU]
    assert [n for n in names if n not in MODULES] == []


def test_the_rooms_are_in_their_order():
    """Whatever a room may import from stands above it in the table: so rooms have no circles."""
    order = list(ROOMS)
    for room, allowed in ROOMS.items():
        assert [n for n in allowed if order.index(room_of(n)) >= order.index(room)] == [], room


def foreign_imports(module):
    """What a module imports from other rooms."""
    return [m for m in own_imports(module) if room_of(m) != room_of(module)]


def allows(room, module):
    """Whether modules of a room may import this one: the longest name decides, "engine" is not "engine.cuda"."""
    return any(is_in(module, name) and room_of(module) == room_of(name) for name in ROOMS[room])


@EVERY_MODULE
def test_a_module_imports_from_rooms_below(module):
    assert [m for m in foreign_imports(module) if not allows(room_of(module), m)] == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_needs_all_that_it_may_import(room):
    """Or the table would allow what nobody has thought of."""
    needed = [n for m in MODULES if room_of(m) == room for n in foreign_imports(m)]
    assert [n for n in ROOMS[room] if not any(is_in(m, n) and room_of(m) == room_of(n) for m in needed)] == []


def test_no_circles():
    """Not inside a room either, and not by way of an import inside a function."""
    graph = {m: {*own_imports(m)} - {m} for m in MODULES}
    done, path = set(), []

    def visit(module):
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        path.append(module)
        for other in sorted(graph[module]):
            visit(other)
        path.pop()
        done.add(module)

    for module in graph:
        visit(module)


# -- the two targets ------------------------------------------------------------------------------------------------


TARGETS = {"cpu": ("kernels.cpu", "engine.cpu"), "cuda": ("kernels.cuda", "engine.cuda")}


def of_target(modules, target):
    return sorted(m for m in modules if any(is_in(m, room) for room in TARGETS[target]))


@pytest.mark.parametrize("target", TARGETS)
def test_targets_do_not_know_each_other(target):
    """Neither engines nor kernels. Arrays of a GPU are known to both engines: behind the face of a Place."""
    (other,) = set(TARGETS) - {target}
    modules = of_target(MODULES, target)
    assert len(modules) > 5
    for module in modules:
        assert of_target(own_imports(module), other) == [], module
    for module in (m for m in modules if is_in(m, f"kernels.{target}")):
        assert of_target(reachable(module), other) == [], module


def test_what_both_targets_share_knows_neither():
    for module in (m for m in MODULES if room_of(m) in ("core", "runtime", "kernels", "engine", "state")):
        assert of_target(own_imports(module), "cpu") + of_target(own_imports(module), "cuda") == [], module


# -- what is outside ------------------------------------------------------------------------------------------------


def outside(module):
    """(name, whether at import time) of what is neither the package's nor Python's."""
    return [(n, early) for n, early in IMPORTS[module] if n.split(".")[0] not in {"nbbn", *sys.stdlib_module_names}]


@EVERY_MODULE
def test_dependencies(module):
    """At import time only what is always installed; frameworks only by the modules for them."""
    for name, at_import in outside(module):
        root = name.split(".")[0]
        allowed = root in ALWAYS_INSTALLED | FACES.get(room_of(module), set()) or root == LIBRARIES.get(module)
        assert allowed or (not at_import and root in OPTIONAL.get(room_of(module), ())), name


@EVERY_MODULE
def test_what_is_of_a_gpu_is_imported_when_it_is_needed(module):
    """numba.cuda, and whatever imports it, by name or through others, never at the import of what is not of a GPU."""
    if any(is_in(module, name) for name in OF_A_GPU):
        return
    assert not [n for n, at_import in IMPORTS[module] if at_import and is_in(n, "numba.cuda")]
    early = own_imports(module, only_at_import=True)
    assert [m for m in early if any(is_in(m, name) for name in OF_A_GPU)] == []


def test_options_are_used():
    """What is allowed inside a function is imported by somebody."""
    for room, names in OPTIONAL.items():
        used = {n.split(".")[0] for m in MODULES if room_of(m) == room for n, _ in outside(m)}
        assert names <= used, room
    for room, names in FACES.items():
        assert names <= {n.split(".")[0] for m in MODULES if room_of(m) == room for n, _ in outside(m)}, room
    for module, name in LIBRARIES.items():
        assert name in {n.split(".")[0] for n, _ in outside(module)}


@EVERY_MODULE
def test_nothing_is_imported_by_a_computed_name(module):
    assert hidden_imports(MODULES[module].read_text(encoding="utf-8")) == []


FOREIGN = {
    *("numba.cuda", "numba_cuda", "cuda", "torch", "cupy", "jax", "jaxlib", "tensorflow", "keras", "tf_keras"),
    *("ml_dtypes", "sklearn", "matplotlib", "threadpoolctl", "tqdm", "safetensors", "h5py", "onnx", "mpi4py"),
}


def test_the_import_brings_no_framework(loaded):
    """In a process that can import all that is installed here."""
    assert [m for m in sorted(loaded) if any(is_in(m, name) for name in FOREIGN)] == []
    assert [m for m in sorted(loaded) if any(is_in(m, f"nbbn.{name}") for name in OF_A_GPU)] == []


def test_calls_on_the_host_bring_no_framework():
    """A whole training step, a list as the input, an array of Python's: nothing of a GPU is asked for."""
    code = """
import sys, array, numpy as np, nbbn
layer = nbbn.BatchNormalization()
x = np.ones((4, 3), np.float32)
for _ in range(3):
    y, pullback = layer.vjp(x, training=True, residual=x.copy())
    pullback(y)
layer.set_weights(layer.get_weights()), layer.to("cpu"), layer.fold(), nbbn.explain(layer, x)
print(*sys.modules)
"""
    after = set(check(code).split())
    assert [m for m in sorted(after) if any(is_in(m, name) for name in FOREIGN)] == []
    assert [m for m in sorted(after) if any(is_in(m, f"nbbn.{name}") for name in OF_A_GPU)] == []


# -- the ground -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["core.rules", "core.layout"])
def test_the_ground_needs_no_arrays(module):
    """layout is integers only; rules are arithmetic only."""
    assert not [name for name, _ in IMPORTS[module] if is_in(name, "numpy")]
