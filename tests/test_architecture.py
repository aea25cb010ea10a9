"""The order of the modules and the sizes of their parts, held against the code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "sklearn_softeq"

# A module imports only from modules before it. A name may be listed before its module exists.
ORDER = (
    "_version",
    # ground
    "groups",
    "kronecker",
    "likelihoods",
    "validation",
    "datasets",
    # model
    "layers",
    "networks",
    # inference
    "hyperparameters",
    "curvature",
    "marginal_likelihood",
    "predictive",
    "symmetry",
    # learning
    "schedules",
    "training",
    # surface
    "estimators",
    "display",
)

# Where a library is met; all others stay free of it.
HOMES = {
    "matplotlib": {"display"},
    "sklearn": {"validation", "datasets", "estimators", "display"},
    "skorch": {"training"},
}

# Test modules that follow a question and not a module.
TESTS_OF_THEIR_OWN = {"common", "architecture", "examples", "docs"}

MAX_BODY = 40
MAX_FILE = 450

MODULES = sorted(p for p in (ROOT / PACKAGE).glob("*.py") if p.stem != "__init__")
SOURCES = sorted([*(ROOT / PACKAGE).glob("**/*.py"), *(ROOT / "tests").glob("*.py")])

each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)

SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_names(tree):
    """Absolute dotted names that a module imports, relative ones resolved to the flat package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = [PACKAGE] * bool(node.level) + [node.module] * bool(node.module)
            yield ".".join(parts)


def own_imports(path):
    """Modules of the package that a module imports; "" stands for the package root."""
    split = (name.partition(".") for name in imported_names(parse(path)))
    return {rest.partition(".")[0] for root, _, rest in split if root == PACKAGE}


def libraries(nodes):
    return {name.partition(".")[0] for node in nodes for name in imported_names(node)}


def without_docstring(scope):
    return scope.body[1:] if ast.get_docstring(scope, clean=False) is not None else scope.body


def body_length(function):
    """Lines from the first statement after the docstring to the last, comments included."""
    body = without_docstring(function)
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def code_lines(path):
    """Number of lines that are neither blank, nor a comment, nor in a docstring."""
    text = path.read_text(encoding="utf-8").splitlines()
    documented = {
        line
        for scope in ast.walk(parse(path))
        if isinstance(scope, SCOPES) and ast.get_docstring(scope, clean=False) is not None
        for line in range(scope.body[0].lineno, scope.body[0].end_lineno + 1)
    }
    code = [line for i, line in enumerate(text, start=1) if i not in documented]
    return sum(1 for line in code if line.strip() and not line.lstrip().startswith("#"))


def outside_functions(tree):
    """Every node of a module that runs when the module is imported."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        children = ast.iter_child_nodes(node)
        waiting += [c for c in children if not isinstance(c, ast.FunctionDef | ast.Lambda)]


def test_every_module_has_a_place():
    unknown = {path.stem for path in MODULES} - set(ORDER)
    assert not unknown, f"add to ORDER, where they are read: {sorted(unknown)}"
    assert len(set(ORDER)) == len(ORDER)


@each_module
def test_imports_only_from_above(path):
    above = set(ORDER[: ORDER.index(path.stem)]) if path.stem in ORDER else set()
    assert own_imports(path) <= above, f"{path.stem} may import from {sorted(above)} only"


@each_module
@pytest.mark.parametrize("library", HOMES)
def test_libraries_stay_at_home(path, library):
    if path.stem not in HOMES[library]:
        assert library not in libraries([parse(path)])


@each_module
def test_matplotlib_waits_for_a_plot(path):
    imports = [
        n for n in outside_functions(parse(path)) if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    assert "matplotlib" not in libraries(imports)


@each_source
def test_no_hasattr(path):
    names = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Name)]
    assert [node.lineno for node in names if node.id == "hasattr"] == []


@each_source
def test_bodies_fit_on_a_screen(path):
    functions = [n for n in ast.walk(parse(path)) if isinstance(n, ast.FunctionDef)]
    long = {f.name: body_length(f) for f in functions if body_length(f) > MAX_BODY}
    assert not long, f"split the functions of more than {MAX_BODY} lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_files_stay_small(path):
    assert code_lines(path) <= MAX_FILE


def test_every_test_module_names_a_module():
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    unknown = tested - {path.stem for path in MODULES} - TESTS_OF_THEIR_OWN
    assert not unknown, f"name after the module that they test: {sorted(unknown)}"


class TestTheChecksThemselves:
    """A check that cannot fail holds nothing."""

    @pytest.fixture
    def module(self, tmp_path):
        def write(text):
            path = tmp_path / "module.py"
            path.write_text(text, encoding="utf-8")
            return path

        return write

    @pytest.mark.parametrize(
        ("line", "found"),
        [
            ("from .layers import Conv", {"layers"}),
            ("from sklearn_softeq.layers import Conv", {"layers"}),
            ("import sklearn_softeq.layers.conv", {"layers"}),
            ("from . import layers", {""}),
            ("from sklearn_softeq import Conv", {""}),
            ("import sklearn_softeq", {""}),
            ("import sklearn", set()),
            ("def f():\n    from .layers import Conv", {"layers"}),
        ],
    )
    def test_own_imports(self, module, line, found):
        assert own_imports(module(line)) == found

    def test_lengths(self, module):
        path = module(
            '"""Doc\nstring."""\n\n# why\ndef f():\n    """Doc."""\n    a = 1\n\n    return a\n'
        )
        (function,) = (n for n in parse(path).body if isinstance(n, ast.FunctionDef))
        assert body_length(function) == 3
        assert code_lines(path) == 3

    def test_imports_inside_functions_wait(self, module):
        text = "import a\nif a: import b\nclass C:\n    import c\n    def f(_):\n        import d\n"
        nodes = outside_functions(parse(module(text)))
        assert libraries(n for n in nodes if isinstance(n, ast.Import)) == {"a", "b", "c"}
