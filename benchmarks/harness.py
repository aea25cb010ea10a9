"""What the benchmarks share: results that are kept, times in turns, images, tables."""

import ast
import fcntl
import hashlib
import json
import operator
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import sklearn
import torch
from scipy.stats import t as student
from sklearn.exceptions import ConvergenceWarning
from torch import nn

import sklearn_softeq
from sklearn_softeq.batches import TrainingData
from sklearn_softeq.budget import CurvaturePlan, rows_of_a_pass
from sklearn_softeq.curvature import Curvature, kronecker_factors
from sklearn_softeq.kronecker import Factor
from sklearn_softeq.likelihoods import Categorical

__all__ = [
    "N_WARM_UP",
    "Results",
    "Step",
    "calibration_error",
    "curvature_of",
    "environment",
    "interval",
    "mark_row",
    "print_marks",
    "print_table",
    "ratio_cells",
    "replaced",
    "smooth_images",
    "standard_error",
    "summary",
    "table_text",
    "timed_rounds",
    "traces_of",
    "training_data",
]

N_WARM_UP = 3
#: Bins of a calibration error.
N_BINS = 15
#: Size of a class's pattern in ``smooth_images``: below, hardly anything can be learned from 5000
#: of them; far above, all is learned in an epoch.
SIGNAL = 0.3
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
COMPARE = {"≤": operator.le, "≥": operator.ge}

Step = Callable[[], object]


class Results:
    """Results by key in a JSON file, with the versions and the cores that they were made with."""

    def __init__(self, path):
        self.path = Path(path)
        self.by_key = json.loads(self.path.read_text()) if self.path.exists() else {}

    def get(self, key, compute):
        """The result of this key, computed only if it is not there."""
        if key not in self.by_key and self.path.exists():
            self.by_key = json.loads(self.path.read_text())  # another process may have been here
        if key not in self.by_key:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # recorded as epochs
                found = {**compute(), "environment": environment()}
            with open(self.path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                # Another process may have added some in the meantime.
                self.by_key = json.loads(self.path.read_text()) if self.path.exists() else {}
                self.by_key[key] = found
                # Aside first: whoever is interrupted leaves a whole file.
                aside = self.path.with_suffix(".part")
                aside.write_text(_lines(self.by_key))
                aside.replace(self.path)
        return self.by_key[key]


def _lines(by_key: dict) -> str:
    """JSON with a line for each result."""
    entries = (f"{json.dumps(key)}: {json.dumps(found)}" for key, found in by_key.items())
    return "{\n" + ",\n".join(entries) + "\n}\n"


def environment():
    """What a time and, to the last digit, a score depend on."""
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
        "torch": torch.__version__,
        "sklearn_softeq": sklearn_softeq.__version__,
        "code": CODE,
    }


def code() -> str:
    """Digest of what the package's modules do, whatever their comments and docstrings say."""
    digest = hashlib.sha256()
    for path in sorted(Path(sklearn_softeq.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
        digest.update(path.name.encode() + ast.dump(tree).encode())
    return digest.hexdigest()[:12]


CODE = code()  # of what has been imported, whatever becomes of the files


def timed_rounds(
    steps: dict[str, Step], rounds: int, warm_up: int = N_WARM_UP
) -> dict[str, np.ndarray]:
    """Processor seconds of each step in each round, in an order drawn anew for each round."""
    # What a step finds in the cache and the allocator depends on the one before it.
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(warm_up + rounds):
        for name in rng.permutation(list(steps)):
            start = time.process_time()
            steps[name]()
            if i >= warm_up:
                seconds[name].append(time.process_time() - start)
    return {name: np.array(found) for name, found in seconds.items()}


def summary(values: np.ndarray) -> dict[str, float]:
    """Median and quartiles."""
    lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75]).round(3).tolist()
    return {"lower": lower, "median": median, "upper": upper}


def ratio_cells(ratio: dict[str, float]) -> tuple[str, str]:
    """Median and quartiles in words."""
    return f"{ratio['median']:.2f}", f"{ratio['lower']:.2f} to {ratio['upper']:.2f}"


def interval(values, digits: int = 2) -> str:
    """Mean and half width of its 95 % interval (Student's t)."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return f"{values.mean():.{digits}f}"
    half = student.ppf(0.975, len(values) - 1) * standard_error(values)
    return f"{values.mean():.{digits}f} ± {half:.{digits}f}"


def standard_error(values: np.ndarray) -> float:
    """Of the mean; NaN of a single value."""
    n = len(values)
    return float(np.std(values, ddof=1) / n**0.5) if n > 1 else float("nan")


def calibration_error(probabilities: np.ndarray, codes: np.ndarray) -> float:
    """Expected calibration error of the most probable class, in bins of equal width."""
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == codes
    bins = np.minimum((N_BINS * confidence).astype(int), N_BINS - 1)
    gaps = np.bincount(bins, confidence - right, N_BINS)
    return float(np.abs(gaps).sum() / len(codes))


def smooth_images(
    n: int, shape: tuple[int, int, int], n_classes: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Random images that are smooth as photographs are, with a faint pattern for each class."""
    rng = np.random.default_rng(seed)
    channels, *sides = shape
    waves = [np.fft.fftfreq(side, 1 / side) for side in sides]
    decay = 1.0 / (1.0 + np.hypot(waves[0][:, None], waves[1][None]))  # Fourier amplitudes ~ 1/f

    def draw(count):
        noise = np.fft.fft2(rng.standard_normal((count, channels, *sides)))
        images = np.fft.ifft2(noise * decay).real
        return images / images.std()

    y = np.arange(n) % n_classes
    return (SIGNAL * draw(n_classes)[y] + draw(n)).astype(np.float32), y


def mark_row(part: str, what: str, figure: float, sign: str, bound: float) -> tuple[str, ...]:
    """A row of the table of marks."""
    met = "yes" if COMPARE[sign](figure, bound) else "no"
    return part, what, f"{sign} {bound:g}", f"{figure:.3g}", met


def print_marks(rows: list[tuple[str, ...]]) -> None:
    """The table of marks; where a benchmark has one it is the last that it prints."""
    print_table(("part", "what", "mark", "found", "met"), rows)


def print_table(head, rows):
    """Print a table in Markdown."""
    print(f"\n{table_text(head, rows)}\n")


def table_text(head, rows) -> str:
    """A table in Markdown."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells):
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(head), line(["-" * w for w in widths]), *map(line, rows)])


def replaced(page: str, section: str, begin: str, end: str) -> str:
    """A page with a new section between two lines that stay."""
    before, found, rest = page.partition(f"{begin}\n")
    _, also_found, after = rest.partition(end)
    if not (found and also_found):
        raise SystemExit(f"The page has no lines {begin} and {end} to write between.")
    return f"{before}{begin}\n\n{section}\n\n{end}{after}"


def training_data(X: np.ndarray | torch.Tensor, y: np.ndarray | torch.Tensor) -> TrainingData:
    """Images (n, C, H, W) and codes, each row once."""
    inputs = torch.as_tensor(X)
    return TrainingData(inputs, torch.as_tensor(y), torch.ones(len(inputs)), float(len(inputs)))


@torch.no_grad()
def traces_of(network: nn.Module, data: TrainingData) -> torch.Tensor:
    """How undecided the network is about each row, which training finds on its way."""
    rows = rows_of_a_pass(network)
    found = [Categorical().hessian_trace(network(x)) for x in data.inputs.split(rows)]
    return torch.cat(found)


def curvature_of(
    network: nn.Module,
    data: TrainingData,
    plan: CurvaturePlan,
    traces: torch.Tensor,
    seed: int = 0,
    constants: Mapping[str, Factor] | None = None,
) -> Curvature:
    """The curvature as a fit estimates it."""
    generator = torch.Generator().manual_seed(seed)
    if plan.n_rows < len(data):
        data = data.sample(plan.n_rows, traces, generator, plan.copies)
    return kronecker_factors(
        network,
        Categorical(),
        data.in_order(rows_of_a_pass(network)),
        estimator=plan.estimator,
        unit_weights=data.unit_weights,
        generator=generator,
        constants=constants,
    )
