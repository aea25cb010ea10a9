"""Names in the documentation exist, docstrings fit the code, and the README runs as written."""

import importlib
import inspect
import re
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sklearn_softeq import (
    SoftEquivariantClassifier,
    SoftEquivariantRegressor,
    base,
    datasets,
    display,
    estimators,
    model_selection,
    regression,
)

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MATHS = (ROOT / "docs" / "maths.md").read_text(encoding="utf-8")
PUBLIC = {
    f"{module.__name__.partition('.')[2]}.{name}": getattr(module, name)
    for module in (estimators, regression, model_selection, display, datasets)
    for name in module.__all__
}

# scikit-learn makes these for metadata routing, and documents them itself.
REQUESTS = {f"set_{method}_request" for method in ("fit", "partial_fit", "predict", "score")}


def methods(cls):
    """Public methods that the class itself defines."""
    return {
        name: value.__func__ if isinstance(value, classmethod) else value
        for name, value in vars(cls).items()
        if not name.startswith("_") and inspect.isroutine(value) and name not in REQUESTS
    }


OWNERS = {**PUBLIC, "base.SoftEquivariantBase": base.SoftEquivariantBase}
DOCUMENTED = PUBLIC | {
    f"{owner}.{name}": method
    for owner, cls in OWNERS.items()
    if inspect.isclass(cls)
    for name, method in methods(cls).items()
}
ESTIMATORS = [SoftEquivariantClassifier, SoftEquivariantRegressor]


def sections(text):
    """The sections of a numpydoc docstring by title."""
    lines = inspect.cleandoc(text).splitlines()
    found, title = {"Summary": []}, "Summary"
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if below and line and set(below) == {"-"}:
            title = line
            found[title] = []
        elif not (line and set(line) == {"-"}):
            found[title].append(line)
    return {title: "\n".join(body).strip() for title, body in found.items()}


def names(section):
    """Names of the entries of a section: ``a, b : type``, not indented."""
    entries = [line for line in section.splitlines() if line and not line.startswith(" ")]
    return [
        name.strip() for entry in entries for name in entry.partition(" : ")[0].split(",") if name
    ]


def resolved(dotted):
    """The object of a dotted name: the longest importable module, then attributes."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(sklearn_softeq[\w.]*)`", MATHS))))
def test_names_in_the_maths_exist(name):
    assert resolved(name) is not None


def test_no_made_up_name_is_resolved():
    for name in ("sklearn_softeq.layers.Nothing", "sklearn_softeq.nothing.Conv"):
        with pytest.raises(AttributeError):
            resolved(name)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_parameters_are_documented(name):
    found = DOCUMENTED[name]
    assert found.__doc__, "no docstring"
    documented = sections(found.__doc__)
    assert documented["Summary"].partition("\n")[0].endswith(".")
    expected = [p for p in inspect.signature(found).parameters if p not in ("self", "cls")]
    assert names(documented.get("Parameters", "")) == expected


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if name not in PUBLIC])
def test_results_are_documented(name):
    assert "Returns" in sections(DOCUMENTED[name].__doc__)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_defaults_are_documented(estimator):
    lines = sections(estimator.__doc__)["Parameters"]
    written = dict(re.findall(r"^(\w+) : .*default=(.*)$", lines, re.MULTILINE))
    parameters = inspect.signature(estimator).parameters.values()
    assert {p.name: str(p.default).replace("'", '"') for p in parameters} == {
        name: value.replace("'", '"').removeprefix('"').removesuffix('"')
        for name, value in written.items()
    }


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_fitted_attributes_are_documented(estimator):
    rng = np.random.RandomState(0)
    X = pd.DataFrame(rng.normal(size=(40, 16)), columns=[f"pixel {i}" for i in range(16)])
    clf = estimator(max_epochs=10, width=2, random_state=0, predictive="laplace")
    clf.fit(X, np.arange(40) % 2)
    documented = names(sections(estimator.__doc__)["Attributes"])
    fitted = {name for name in vars(clf) if name.endswith("_") and not name.startswith("_")}
    assert sorted(documented) == sorted(fitted | {"module_"})  # a property


def blocks(title):
    """The Python code of a section of the README."""
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(code) for code in re.findall(r"```python\n(.*?)```", section, re.S)]


def titles():
    return re.findall(r"^## (.*)$", README, re.MULTILINE)


@pytest.mark.parametrize("title", titles())
def test_readme_compiles(title):
    for code in blocks(title):
        compile(code, f"README.md, {title}", "exec")


def test_readme_names_the_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)) - {"help"}
    assert set(re.findall(r"`make ([a-z-]+)`", README)) == targets


def run(codes, folder, monkeypatch):
    monkeypatch.chdir(folder)
    scope = {}
    for code in codes:
        exec(compile(code, "README.md", "exec"), scope)
    return scope


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_readme_use(tmp_path, monkeypatch):
    scope = run(blocks("Use"), tmp_path, monkeypatch)
    assert scope["clf"].image_shape_ == (2, 4, 8)
    assert scope["stream"].n_observations_ == 80
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_readme_quick_start(tmp_path, monkeypatch, capsys):
    start = blocks("Quick start")
    figures = blocks("What the figure and the table say")
    scope = run([*start, *figures], tmp_path, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    said = [line.split(":")[0] for line in lines]
    assert said[:2] == ["trials, log likelihood of held-out rows", "start"]
    assert said[2:4] == ["curvature", "epoch 5/400"]
    assert any(line.startswith("accuracy 0.9") for line in lines)
    assert scope["clf"].symmetry_.shape == (6, 2)
    assert not list(tmp_path.iterdir())
