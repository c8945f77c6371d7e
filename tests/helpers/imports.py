"""Which module of nbbn/ imports which, read from the text: a lazy import inside a function counts like any other."""

import ast
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(find_spec("nbbn").origin).parent  # read, not imported: a circle could not be


def name_of(path):
    """The dotted name inside the package; "nbbn" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "nbbn"


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_in(module, name):
    return module == name or module.startswith(f"{name}.")


def statements(tree):
    """(node, whether it runs when the module is imported) of every node: not in a function, and not for type checkers
    alone."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)

    def visit(node, at_import):
        yield node, at_import
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for name, value in ast.iter_fields(node):
            later = (isinstance(node, functions) or typing_only) and name == "body"
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child, at_import and not later)

    yield from visit(tree, True)


IMPORTERS = ("import_module", "__import__")


def called_importer(node):
    """The name that a call such as importlib.import_module("a.b") imports; None for all other nodes."""
    if not isinstance(node, ast.Call) or getattr(node.func, "attr", getattr(node.func, "id", None)) not in IMPORTERS:
        return None
    argument = node.args[0] if len(node.args) == 1 and not node.keywords else None
    return argument.value if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else None


def imports_of_text(text, where="the text"):
    """(what is imported, whether it happens when this module is imported), for every statement and call."""
    found = []
    for node, at_import in statements(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where}: a relative import"
            assert [a.name for a in node.names] != ["*"], f"{where}: an import of everything"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [name] if (name := called_importer(node)) else []
        found += [(name, at_import) for name in names]
    return found


def hidden_imports(text):
    """The lines that can import what nobody can read: anything but a call with a literal name, and code in a string."""
    nodes = [node for node, _ in statements(ast.parse(text))]
    readable = {id(node.func) for node in nodes if called_importer(node)}
    found = []
    for node in nodes:
        name = getattr(node, "attr", getattr(node, "id", None))
        if name in IMPORTERS and id(node) not in readable:
            found.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and any(a.name in IMPORTERS and a.asname for a in node.names):
            found.append(node.lineno)
        if isinstance(node, ast.Name) and name in ("exec", "eval"):
            found.append(node.lineno)
    return found


IMPORTS = {module: imports_of_text(path.read_text(encoding="utf-8"), path) for module, path in MODULES.items()}


def own_imports(module, only_at_import=False):
    """The modules of the package that a module imports. `from nbbn.room import module` is of the module alone."""
    for name, at_import in IMPORTS[module]:
        root, _, rest = name.partition(".")
        if root == "nbbn" and (at_import or not only_at_import):
            names = (rest, rest.rpartition(".")[0])
            yield next((n for n in names if n in MODULES), "nbbn")


def reachable(module):
    """All that a module needs, directly or not, sooner or later."""
    found, waiting = set(), [module]
    while waiting:
        for other in own_imports(waiting.pop()):
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found
