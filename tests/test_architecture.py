"""A module imports only from the floors below its own, and nothing but Numba and NumPy from outside."""

import ast
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGE = Path(find_spec("nbbn").origin).parent  # read, not imported: a circle could not be

# From the ground up. A folder's name stands for all that is in it and has no floor of its own.
FLOORS = [
    ["rules", "layout", "dtypes", "runtime", "_registry"],
    ["initializers", "regularizers", "constraints"],
    ["kernels"],
    ["options", "operands", "schedule", "plan", "repeats", "dispatcher", "variables"],
    ["gpu", "adapters"],
    ["nn", "pullback", "folding"],
    ["gpu.calls", "placement"],
    ["layers"],
    ["inspection", "planning"],
    ["warming"],
    [""],  # nbbn itself, the face
    ["compat", "info", "demo"],
    ["__main__"],
]
RUNTIME_DEPENDENCIES = {"numba", "numpy", "llvmlite"}
# What else a module may import, and only inside a function.
OPTIONAL = {
    "info": {"ml_dtypes"},
    "demo": {"sklearn", "matplotlib", "tqdm"},
    "warming": {"tqdm"},
    "gpu": {"cuda"},
}
# Imported when an array of theirs comes in, and not before.
LAZY = ("kernels.cuda", "gpu", "adapters")
TARGETS = ("cpu", "cuda")
FRAMEWORKS = {"cupy", "jax", "torch"}


def name_of(path):
    """The dotted name inside the package; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def floor_of(module):
    """The number of the floor of the longest matching name; None for a module that nobody has placed."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((i for n in names for i, floor in enumerate(FLOORS) if n in floor), None)


def imports(path):
    """(what is imported, whether it happens at import time), for every import statement."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, id(node) not in inside) for name in names)


def own_imports(module):
    """The modules of the package that a module imports, at import time or later."""
    for name, _ in imports(MODULES[module]):
        root, _, rest = name.partition(".")
        if root == "nbbn":
            yield rest if rest in MODULES else rest.rpartition(".")[0]


def test_every_module_has_a_floor():
    assert [m for m in MODULES if floor_of(m) is None] == []


def test_every_floor_has_a_module():
    """Or its name is misspelt."""
    names = {name for floor in FLOORS for name in floor} - {"info", "demo", "__main__"}
    assert names <= set(MODULES)


@pytest.mark.parametrize("module", list(MODULES))
def test_no_import_from_above(module):
    above = [m for m in own_imports(module) if floor_of(m) > floor_of(module)]
    assert above == [], f"nbbn.{module} imports from above: {above}"


def test_no_circles():
    """Not inside a floor either."""
    graph = {m: set(own_imports(m)) - {m} for m in MODULES}
    done, path = set(), []

    def visit(module):
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        path.append(module)
        for other in graph[module]:
            visit(other)
        path.pop()
        done.add(module)

    for module in graph:
        visit(module)


def target_of(module):
    """The target that a kernel module is for; None for what all of them share."""
    parts = module.split(".")
    return parts[1] if parts[0] == "kernels" and parts[1:] and parts[1] in TARGETS else None


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("kernels.")])
def test_targets_do_not_know_each_other(module):
    others = [m for m in own_imports(module) if target_of(m) not in (None, target_of(module))]
    assert others == []


def test_what_is_lazy_is_imported_inside_functions():
    for module in MODULES:
        if not module.startswith(LAZY):
            early = [n for n, at_import in imports(MODULES[module]) if at_import and n.startswith("nbbn.")]
            assert not [n for n in early if n.removeprefix("nbbn.").startswith(LAZY)], module


@pytest.mark.parametrize("module", list(MODULES))
def test_dependencies(module):
    """At import time only what is always installed; frameworks and numba.cuda never."""
    top = module.split(".")[0]
    for name, at_import in imports(MODULES[module]):
        root = name.split(".")[0]
        if root == "nbbn" or root in sys.stdlib_module_names:
            continue
        if (not at_import and root in OPTIONAL.get(top, ())) or (top == "adapters" and root in FRAMEWORKS):
            continue
        assert root in RUNTIME_DEPENDENCIES, f"nbbn.{module} imports {name}"
        if at_import and not module.startswith(LAZY):
            assert not name.startswith("numba.cuda"), f"nbbn.{module} imports {name}"


def test_the_ground_needs_no_arrays():
    """layout is integers only; rules are scalars only."""
    for module in ("rules", "layout"):
        assert not [name for name, _ in imports(MODULES[module]) if name.startswith("numpy")]
