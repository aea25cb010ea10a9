"""What the benchmarks conclude from their fits, on fits made by hand."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_results_say_which_code_made_them(monkeypatch, tmp_path, benchmark):
    harness = benchmark("harness")
    monkeypatch.setattr(harness.sklearn_softeq, "__file__", str(tmp_path / "__init__.py"))
    module = tmp_path / "module.py"

    def digest(text):
        module.write_text(text)
        return harness.code()

    first = digest('"""What."""\n\n\ndef f():\n    """How."""\n    return 1\n')
    assert digest('"""Why."""\n\ndef f():\n    return 1  # so\n') == first
    assert digest("def f():\n    return 2\n") != first
    module.unlink()
    assert harness.code() != first
    assert harness.environment()["code"] == harness.CODE != first


def fit(nll, seconds=10.0, **figures):
    found = {"nll": nll, "log_evidence": -1.0, "accuracy": 0.9, "seconds": seconds}
    return {**found, "environment": {}, **figures}


def fits_of(tables, **by_model):
    """Fits of a cell with a learned prior, from lists of NLLs by seed."""
    hard_coded = {name: [5.0] * 3 for name in tables.HARD_CODED} | by_model
    return {
        (model, "learned"): {seed: fit(nll) for seed, nll in enumerate(nlls)}
        for model, nlls in hard_coded.items()
    }


def test_the_best_hard_coded_network_has_the_best_mean_over_common_seeds(benchmark):
    tables = benchmark("symmetry_tables")
    fits = fits_of(tables, conv=[0.3, 0.3], p4_conv=[0.1, 0.6, 0.0, 0.0])
    assert tables.best_hard_coded(fits) == ("conv", "learned")  # of the seeds that all have
    del fits["sparse_fc", "learned"]
    assert tables.best_hard_coded(fits) is None
    fits["sparse_fc", "learned"] = {7: fit(0.0)}
    assert tables.best_hard_coded(fits) is None


@pytest.mark.parametrize(
    ("nll", "evidence", "accuracy", "kept"),
    [
        (0.519, -1.019, 0.891, "yes"),
        (0.521, -1.019, 0.891, "no"),
        (0.519, -1.021, 0.891, "no"),
        (0.519, -1.019, 0.889, "no"),
    ],
)
def test_promises(nll, evidence, accuracy, kept, benchmark):
    tables = benchmark("symmetry_tables")
    fits = fits_of(tables, conv=[0.5] * 25, factored_fc=[5.0] * 25)
    fits["all", "learned"] = {
        seed: fit(nll, log_evidence=evidence, accuracy=accuracy) for seed in range(3, 30)
    }
    cells = {("digits", "digit"): fits}
    (row,) = tables.promises(cells)
    row = dict(zip(tables.HEADS["promises"], row, strict=True))
    assert row["best hard-coded"] == "conv"
    assert row["pairs"] == "22"
    assert row["NLL"] == f"{nll - 0.5:+.3f} ± 0.000"
    assert row["log evidence"] == f"{evidence + 1:+.2f} ± 0.00"
    assert row["accuracy, %"] == f"{100 * (accuracy - 0.9):+.1f} ± 0.0"
    assert row["met"] == kept
    (later,) = tables.promises(cells, first_seed=24)
    later = dict(zip(tables.HEADS["promises"], later, strict=True))
    assert (later["pairs"], later["met"]) == ("1", f"so far {kept}")
    assert later["NLL"] == f"{nll - 0.5:+.3f}"  # one pair has no error
    assert tables.promises(cells, first_seed=25) == []


def test_a_fixed_prior_may_have_its_logits_scaled(benchmark):
    tables = benchmark("symmetry_tables")
    fits = fits_of(tables)
    fits["all", "learned"] = {0: fit(0.2), 1: fit(0.3), 2: fit(9.0)}
    fits["all", "MAP"] = {0: fit(0.5, scaled_nll=0.3), 1: fit(0.5, scaled_nll=0.5)}
    fits["all", "chosen"] = {
        0: fit(0.1, scaled_nll=0.3, seconds=5.0),
        1: fit(0.1, scaled_nll=0.2, seconds=8.0),
        2: fit(0.1, scaled_nll=0.2, seconds=40.0),
    }
    cells = {("a", "b"): fits, ("a", "c"): fits_of(tables)}
    (row,) = tables.fixed_priors(cells)
    assert len(row) == len(tables.HEADS["fixed"])
    assert row[2:] == (
        "2, 3",
        *("-0.250 ± 0.050", "-0.150 ± 0.050"),
        *("+3.067 ± 2.917", "+2.933 ± 2.934"),
        "1.25",
    )


def open_fit(error, precisions):
    return {
        "shifts": [0.0, error],
        "pathways": ["conv", "factored_fc", "sparse_fc"],
        "log_precisions": [[-9.0, *precisions], [-9.0, 4.0, None]],
    }


@pytest.mark.parametrize(
    ("kept", "broken", "apart"),
    [
        ([(0.1, (None, 3.0))] * 5, [(1.0, (2.0, None))] * 5, "yes"),
        ([(0.1, (None, 3.0))] * 4, [(1.0, (2.0, None))] * 5, "so far yes"),
        ([(0.1, (None, 3.0))] * 5, [(1.0, (None, None)), *[(1.0, (2.0, None))] * 4], "no"),
        ([(0.1, (None, 1.0)), *[(0.1, (None, 3.0))] * 4], [(1.0, (2.0, None))] * 5, "no"),
        ([(0.1, (None, 3.0))] * 5, [(0.1, (2.0, None)), *[(1.0, (2.0, None))] * 4], "no"),
    ],
)
def test_told_apart(kept, broken, apart, benchmark):
    tables = benchmark("symmetry_tables")
    cells = {
        ("digits", task): {("all", "learned"): dict(enumerate(open_fit(*of) for of in fits))}
        for task, fits in (("digit", kept), ("quadrant", broken))
    }
    (row,) = tables.told_apart(cells)
    row = dict(zip(tables.HEADS["apart"], row, strict=True))
    assert row["fits"] == f"{len(kept)} / 5"
    assert row["apart"] == apart


def test_lowest_precision(benchmark):
    tables = benchmark("symmetry_tables")
    found = open_fit(0.0, (1.0, 0.5))
    assert tables.lowest_precision(found, tables.FREE) == 0.5
    assert tables.lowest_precision(found, ("sparse_fc",)) == 0.5
    assert tables.lowest_precision(found, ("factored_fc",)) == 1.0
    assert tables.lowest_precision(open_fit(0.0, (None, None)), ("sparse_fc",)) == math.inf
    assert tables.lowest_precision(found, ("free",)) == math.inf


class Stub:
    """Logits that fit the training data too well, and half of the test data."""

    classes_ = np.array(["a", "b"])

    def predict_log_proba(self, X):
        logits = np.stack([X, np.zeros_like(X)], axis=1)
        return (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("size", "scale"), [(40.0, math.log(math.expm1(0.005)) / -40.0), (2.0, 1)])
def test_scaled_nll(size, scale, benchmark):
    symmetry = benchmark("symmetry")
    X, y = np.array([size, -size]), np.array(["a", "b"])
    X_test, y_test = np.array([size, -size / 2]), np.array(["b", "b"])
    found = symmetry.scaled_nll(Stub(), X, y, X_test, y_test)
    of_each = np.logaddexp(0.0, scale * X_test)
    assert found == pytest.approx(of_each.mean(), rel=1e-4)


def test_choice_of_a_precision_keeps_to_its_seconds(monkeypatch, benchmark):
    symmetry = benchmark("symmetry")
    fitted = []

    class Recorder(symmetry.SoftEquivariantClassifier):
        def fit(self, X, y):
            fitted.append((self.prior_precision, self.start, self.max_epochs, len(y)))
            self.classes_ = np.unique(y)
            return self

        def predict_proba(self, X):
            p = 0.9 if self.prior_precision == 10.0 else 0.6
            return np.stack([np.where(X[:, 0] > 0, 1 - p, p), np.where(X[:, 0] > 0, p, 1 - p)], 1)

    monkeypatch.setattr(symmetry, "seconds_per_epoch", lambda clf, X, y: 0.1)
    X, y = np.arange(-10, 10)[:, None] + 0.5, np.repeat([0, 1], 10)
    clf = Recorder(learn_prior=False, random_state=0)
    choice = symmetry.choose_precision(clf, X, y, 48.0)
    # 480 epochs in all: half of them for 3 precisions × 5 folds of four fifths of the rows.
    assert fitted == [(decay, "joint", 20, 16) for decay in symmetry.DECAYS for _ in range(5)]
    assert choice.fold_epochs == 20
    assert np.argmax(choice.scores) == 1
    assert (clf.prior_precision, clf.max_epochs, clf.start) == (10.0, 240, "symmetric")


def opinions(selection, **by_model):
    return {
        model: {"evidence": selection.Opinion(score, nll)}
        for model, (score, nll) in by_model.items()
    }


def test_selectors_are_judged_by_pairs_and_regret(benchmark):
    selection = benchmark("selection")
    choices = [
        opinions(selection, a=(2.0, 0.1), b=(1.0, 0.2), c=(3.0, 0.6)),  # .1 right, .4 and .5 wrong
        opinions(selection, a=(2.0, 0.1), b=(1.0, 0.14)),  # too near to each other
        opinions(selection, a=(2.0, 0.1), b=(1.0, 0.2)),
    ]
    choices[0]["a"]["hold-out"] = selection.Opinion(0.0, 0.1)  # not of every model: not judged
    evidence, hold_out = selection.table_of(choices)
    assert evidence == (
        *("evidence", "3", "50 ± 33 % of 4", "100 ± 0 % of 2"),
        "0.167 ± 0.167",
    )
    assert hold_out == ("hold-out", "0", "", "", "")


def test_what_selectors_say(benchmark):
    selection = benchmark("selection")
    whole = {"log_evidence": -1.0, "linear_term": 0.5, "nll": 0.3}
    fold = {"log_likelihood": -20.0, "n_rows": 40, "nll": 0.4, "of_fewer": {"10": -0.7}}
    last = {"log_likelihood": -30.0, "n_rows": 10, "nll": 0.5}
    found = selection.opinions_of(whole, {0: fold}, None)
    assert found == {
        "evidence": (-1.0, 0.3),
        "evidence, linear term": (-0.5, 0.3),
        "hold-out": (-0.5, 0.3),
        "hold-out, its own network": (-0.5, 0.4),
        "10 rows of the hold-out": (-0.7, 0.3),
    }
    mode = {"log_evidence": -2.0, "linear_term": 0.0, "nll": 0.6}
    found = selection.opinions_of(whole, {**dict.fromkeys(range(4), fold), 4: last}, mode)
    assert found["polished evidence"] == (-2.0, 0.6)
    assert found["five folds"] == (-110.0 / 170, 0.3)


def test_a_section_of_a_page_is_replaced(benchmark):
    replaced = benchmark("harness").replaced
    page = "before\n<!-- a -->\n\nold\n\n<!-- b -->\nafter\n"
    new = replaced(page, "new", "<!-- a -->", "<!-- b -->")
    assert new == "before\n<!-- a -->\n\nnew\n\n<!-- b -->\nafter\n"
    assert replaced(new, "new", "<!-- a -->", "<!-- b -->") == new
    with pytest.raises(SystemExit, match="no lines"):
        replaced("before\n<!-- a -->\n", "new", "<!-- a -->", "<!-- b -->")


def whole_fit(nll, pathways):
    n = len(pathways)
    figures = {"ece": 0.1, "linear_term": 0.2, "shifts": [0.0, 0.1], "turns": [0.0, 0.3]}
    of_pathways = {"effective_dimensions": [[2.0] * n] * 2, "log_precisions": [[1.5] * n] * 2}
    return fit(nll, **figures, **of_pathways, pathways=pathways, epochs=7)


def test_report_has_a_table_of_each_cell(benchmark):
    tables = benchmark("symmetry_tables")
    fits = {
        (model, "learned"): {seed: whole_fit(nll + 0.02 * seed, [model]) for seed in (0, 5)}
        for model, nll in {**dict.fromkeys(tables.HARD_CODED, 1.0), "conv": 0.5}.items()
    }
    fits["all", "learned"] = {
        seed: whole_fit(0.4, ["conv", "factored_fc", "sparse_fc"]) for seed in (0, 5)
    }
    text = tables.report({("digits", "digit"): fits, ("mnist", "plain"): {}})
    assert "## digits, digit" in text
    assert "## mnist, plain" not in text
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith(("| model ", "| all "))
    ]
    row = {}  # of two tables
    for head, found in (lines[:2], lines[2:]):
        row |= dict(zip(head, found, strict=True))
    assert row.keys() == set(tables.HEADS["cell"])
    assert row["NLL"] == "0.400 ± 0.000"
    assert row["regret"] == "-0.150 ± 0.635"  # −.1 and −.2, and Student's t of one degree
    assert row["γ of free pathways"] == "8.0 ± 0.0"
    assert row["lowest log δ of them"] == "1.5"
    assert text.count("so far yes") == 2  # all seeds, and those from 5 on
    assert text.endswith("Fits by states of the code: 10 by not recorded.")
    for section in tables.summary({("digits", "digit"): fits}).values():
        assert section in text


def test_a_picture_of_the_promise(benchmark, tmp_path):
    pytest.importorskip("matplotlib")
    draw, tables = benchmark("symmetry_figure").draw, benchmark("symmetry_tables")
    fits = {(model, "learned"): {0: fit(0.5), 1: fit(0.6)} for model in tables.HARD_CODED}
    fits["all", "learned"] = {0: fit(0.4), 1: fit(0.7)}
    cells = {("digits", "digit"): fits, ("mnist", "plain"): {}}  # one has nothing yet
    draw(cells, tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes()[1:4] == b"PNG"


def test_seconds_of_fits_tell_all_pathways_from_one(benchmark):
    tables = benchmark("symmetry_tables")

    def fits(seconds, epochs):
        pairs = enumerate(zip(seconds, epochs, strict=True))
        return {seed: {"seconds": s, "epochs": e} for seed, (s, e) in pairs}

    cell = {
        ("conv", "learned"): fits([10.0, 20.0], [400, 100]),
        ("all", "learned"): fits([70.0, 70.0], [100, 300]),
        ("all", "MAP"): fits([1.0], [400]),
    }
    assert (
        "one or two pathways 10 to 20 s (50 % at the cap); with all pathways 70 to 70 s (0 %"
        in (" ".join(tables.seconds_of_fits({("digits", "digit"): cell}).split()))
    )
