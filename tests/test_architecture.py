"""The order of the modules and the sizes of their parts, held against the code."""

import ast
import re
from pathlib import Path

import pytest

from sklearn_softeq.layers import PATHWAYS

ROOT = Path(__file__).parent.parent
PACKAGE = "sklearn_softeq"

# A module imports only from modules before it. A name may be listed before its module exists.
# A folder is one module to all outside it, who import from its __init__; inside, its files see
# what stands before the folder, and the files before them.
ORDER = (
    "_version",
    # ground
    "notices",
    "docstrings",
    "devices",
    "processes",
    "memory",
    "twins",
    "trees",
    "records",
    "blobs",
    "descriptions",
    "groups",
    "anchors",
    "kronecker",
    "likelihoods",
    "validation",
    "datasets",
    # model
    "layers.contract",
    "layers.fc",
    "layers.factored",
    "layers.torus",
    "layers.conv",
    "layers.sparse",
    "layers.group",
    "layers.pathways",
    "layers",
    "networks",
    # inference
    "hyperparameters",
    "curvature",
    "budget",
    "marginal_likelihood",
    "posterior",
    "predictive",
    "symmetry",
    # learning
    "states",
    "batches",
    "schedules",
    "kfac",
    "training",
    "trials",
    "course",
    "checkpoint",
    # surface
    "progress",
    "simplification",
    "onnx_export",
    "assembly",
    "persistence",
    "base",
    "estimators",
    "regression",
    "model_selection",
    "display",
)

# Where a library is met; all others stay free of it.
HOMES = {
    "matplotlib": {"display"},
    "sklearn": {
        "validation",
        "datasets",
        "progress",
        "simplification",
        "base",
        "estimators",
        "regression",
        "model_selection",
        "display",
    },
    "skorch": {"training", "trials", "course", "checkpoint", "progress", "assembly"},
}

# Test modules that follow a question and not a module.
TESTS_OF_THEIR_OWN = {
    "common",
    "architecture",
    "examples",
    "docs",
    "lengthscales",
    "gpu",
    "interrupts",
    "faults",
    "properties",
    "imports",
    "benchmarks",
    "full_scale",
    "composition",
}

# Modules without a test module of their own, as what they hold is seen from outside.
TESTED_ELSEWHERE = (
    "_version",  # a string
    "trees",  # by test_records and test_blobs, whose files hold trees
    # The layers one by one, all by the same tests: in test_layers.
    "layers.contract",
    "layers.fc",
    "layers.factored",
    "layers.sparse",
    "layers.group",
)

# They know a tensor's name and the contract of its map, and nothing of the layer that has it.
BLIND = {
    "hyperparameters",
    "curvature",
    "budget",
    "marginal_likelihood",
    "posterior",
    "predictive",
    "symmetry",
}

MAX_BODY = 40
MAX_FILE = 450


def name_of(path):
    """The dotted name of a module in the package; a folder's __init__ has that of the folder."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = sorted(p for p in (ROOT / PACKAGE).glob("**/*.py") if name_of(p))
NAMES = {name_of(path) for path in MODULES}
SOURCES = sorted([ROOT / PACKAGE / "__init__.py", *MODULES, *(ROOT / "tests").glob("*.py")])

each_module = pytest.mark.parametrize("path", MODULES, ids=name_of)
each_source = pytest.mark.parametrize(
    "path", SOURCES, ids=lambda path: f"{path.parent.name}.{path.stem}"
)

SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_names(tree, package):
    """Absolute dotted names that a module of a package imports, relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = package.split(".")[: len(package.split(".")) + 1 - node.level]
            yield ".".join(home * bool(node.level) + [node.module] * bool(node.module))


def own_imports(path, folder=None):
    """Modules of the package that a module imports; "" stands for the package root."""
    package = ".".join([PACKAGE] + [folder] * bool(folder))
    split = (name.partition(".") for name in imported_names(parse(path), package))
    return {rest for root, _, rest in split if root == PACKAGE}


def libraries(nodes):
    return {name.partition(".")[0] for node in nodes for name in imported_names(node, PACKAGE)}


def folder_of(path):
    """The folder of the package that a module lies in, if any."""
    return ".".join(path.relative_to(ROOT / PACKAGE).parts[:-1])


def may_import(name, folder):
    """What stands before a module in ORDER, and of other folders only the folder itself."""
    above = ORDER[: ORDER.index(name)]
    return {module for module in above if module.rpartition(".")[0] in ("", folder)}


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
    unknown = NAMES - set(ORDER)
    assert not unknown, f"add to ORDER, where they are read: {sorted(unknown)}"
    assert len(set(ORDER)) == len(ORDER)


@each_module
def test_imports_only_from_above(path):
    name, folder = name_of(path), folder_of(path)
    above = may_import(name, folder) if name in ORDER else set()
    assert own_imports(path, folder) <= above, f"{name} may import from {sorted(above)} only"


def test_a_folder_is_one_module_to_the_others():
    assert may_import("networks", "") >= {"layers", "groups"}
    assert not any(name.startswith("layers.") for name in may_import("networks", ""))
    inside = may_import("layers.fc", "layers")
    assert inside >= {"groups", "anchors", "layers.contract"}
    assert not inside & {"layers", "layers.conv", "networks"}
    assert may_import("layers", "layers") > inside | {"layers.pathways"}


@each_module
@pytest.mark.parametrize("library", HOMES)
def test_libraries_stay_at_home(path, library):
    if name_of(path) not in HOMES[library]:
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


def keeps_parameters(function):
    """Whether all that a function does is to keep each of its arguments by its name."""
    names = [f"self.{arg.arg} = {arg.arg}" for arg in function.args.kwonlyargs]
    return bool(names) and [ast.unparse(statement) for statement in function.body] == names


@each_source
def test_bodies_fit_on_a_screen(path):
    functions = [n for n in ast.walk(parse(path)) if isinstance(n, ast.FunctionDef)]
    functions = [f for f in functions if not keeps_parameters(f)]
    long = {f.name: body_length(f) for f in functions if body_length(f) > MAX_BODY}
    assert not long, f"split the functions of more than {MAX_BODY} lines"


@each_module
def test_files_stay_small(path):
    assert code_lines(path) <= MAX_FILE


def words(tree):
    """Every name that a module uses, and every word of its strings but for the docstrings."""
    documented = {
        id(scope.body[0].value)
        for scope in ast.walk(tree)
        if isinstance(scope, SCOPES) and ast.get_docstring(scope, clean=False) is not None
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in documented:
                yield from re.findall(r"\w+", node.value)


def layer_classes():
    """The classes that the files of layers/ define, but for the contract and the table."""
    found = set()
    for path in MODULES:
        if folder_of(path) == "layers" and path.stem not in ("contract", "pathways", "__init__"):
            found |= {n.name for n in ast.walk(parse(path)) if isinstance(n, ast.ClassDef)}
    return found


@pytest.mark.parametrize("name", sorted(BLIND))
def test_inference_knows_no_layer(name):
    classes = layer_classes()
    assert {"FC", "PooledFC", "FactorU", "Conv", "SparseFC", "SparseV", "GroupConv"} <= classes
    named = set(words(parse(ROOT / PACKAGE / f"{name}.py"))) & (classes | set(PATHWAYS))
    assert not named, f"{name} is for every layer; it names {sorted(named)}"


def test_every_test_module_names_a_module():
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    unknown = tested - {name.replace(".", "_") for name in NAMES} - TESTS_OF_THEIR_OWN
    assert not unknown, f"name after the module that they test: {sorted(unknown)}"


def test_every_module_has_a_test_module():
    without = {
        name
        for name in NAMES
        if not (ROOT / "tests" / f"test_{name.replace('.', '_')}.py").exists()
    }
    assert without == set(TESTED_ELSEWHERE)


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
            ("import sklearn_softeq.layers.conv", {"layers.conv"}),
            ("from .layers.conv import Conv", {"layers.conv"}),
            ("from . import layers", {""}),
            ("from sklearn_softeq import Conv", {""}),
            ("import sklearn_softeq", {""}),
            ("import sklearn", set()),
            ("def f():\n    from .layers import Conv", {"layers"}),
        ],
    )
    def test_own_imports(self, module, line, found):
        assert own_imports(module(line)) == found

    @pytest.mark.parametrize(
        ("line", "found"),
        [
            ("from .conv import Conv", {"layers.conv"}),
            ("from . import Conv", {"layers"}),
            ("from ..groups import P1", {"groups"}),
            ("from ..layers import Conv", {"layers"}),
            ("from .. import Conv", {""}),
            ("from sklearn_softeq.layers.conv import Conv", {"layers.conv"}),
        ],
    )
    def test_own_imports_inside_a_folder(self, module, line, found):
        assert own_imports(module(line), "layers") == found

    @pytest.mark.parametrize(
        ("line", "found"),
        [
            ("isinstance(layer, Conv)", {"isinstance", "layer", "Conv"}),
            ("layers.Conv", {"layers", "Conv"}),
            ("from .layers import Conv as C", {"Conv"}),
            ("a = 'blocks.conv'", {"a", "blocks", "conv"}),
            ('"""A Conv."""', set()),
            ('def f():\n    """A Conv."""\n    return "fc"', {"fc"}),
            ("# Conv", set()),
        ],
    )
    def test_words(self, module, line, found):
        assert set(words(parse(module(line)))) == found

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
