"""A fit on disk: what it was called with, and its state at ends of epochs, to go on from.

:func:`snapshot` and :func:`restore` know all that decides the rest of a training; a :class:`Run` is
the folder of a fit, and :class:`Checkpoint` writes into it from time to time.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skorch.callbacks import Callback

from ._version import __version__
from .batches import TrainingData
from .descriptions import IndescribableError, described
from .groups import P1, POINT_GROUPS
from .layers import PATHWAYS
from .marginal_likelihood import AdamSolver, Ascent
from .notices import warn
from .processes import Processes
from .records import DamagedError, ForeignError, digest, read, write
from .schedules import JointStart, LearningRate, Plateau, Start, SymmetricStart
from .states import State, WeightMean
from .training import SoftEquivariantNet
from .validation import check_names

__all__ = [
    "Checkpoint",
    "Run",
    "columns",
    "data_digests",
    "identity",
    "open_run",
    "plain_start",
    "restore",
    "rows",
    "snapshot",
    "start_from",
]

#: Largest share of the time of training that is spent on writing.
SHARE = 0.05

#: The files of a run take turns: while one is written the other is what there is to go on from.
FILES = ("checkpoint.0", "checkpoint.1")

#: What a killed process left half-written is taken away when it is so old, in seconds; what is
#: younger may be another process's.
LITTER = 3600.0

#: Parameters that have no influence on what is learned, or stand in an identity in another form.
OTHER = (
    *("callbacks", "checkpoint_dir", "device", "dtype", "verbose", "warm_start"),
    *("predictive_samples", "predictive_temperature"),
)

#: Largest integer of an array.
INT_MAX = 2**63 - 1

#: Entries of an identity that are digests and say nothing to a reader.
DIGESTS = ("X", "y", "sample_weight", "the model to go on from")

#: A record of a fit that has not begun, but for what every record has.
EMPTY: dict[str, Any] = dict.fromkeys(("seeds", "trials", "state", "outcome")) | {"number": -1}
RECORD = {*EMPTY, "identity", "threads"}

_GROUPS = {group.name: group for group in (P1, *POINT_GROUPS.values())}

# ── the state of a training


def snapshot(net: SoftEquivariantNet) -> dict[str, Any]:
    """All that decides the rest of a training at the end of an epoch, as plain values and tensors.

    Left out are what the next epochs compute again to the last bit (eigenvalues and factors of the
    data, inverses of K-FAC's factors, plans of the curvature), what lives no longer than an epoch,
    and the losses of single batches.
    """
    course, evidence = net.course, net.course.evidence
    training = "decay_" in vars(net)
    names = {id(tensor): name for name, tensor in net.module_.named_parameters()}
    return {
        "network": dict(net.module_.state_dict()),
        "prior": dict(net.prior_.state_dict()),
        "noise": net.criterion_.log_hyperparameters(),
        "optimizer": _optimizer_state(net.optimizer_, names),
        "decays": [(names[id(p)], *rest) for p, *rest in net.decay_] if training else None,
        "history": columns(net.history),
        "course": {
            "start": plain_start(course.start),
            "rate": asdict(course.rate),
            "plateau": asdict(course.plateau),
            "holding": course.holding,
            "converged": course.converged,
            "capped": course.capped,
            "spare_starts": course.spare_starts,
            "mean": vars(course.mean),
            "best": None if course.best is None else (course.best[0], _plain_state(course.best[1])),
        },
        "evidence": {
            "burn_in": evidence.burn_in,
            "ramp": evidence.ramp,
            "ramp_from": evidence.ramp_from,
            "state": None if evidence.state is None else _plain_state(evidence.state),
            "slopes": evidence._slopes,
            "mean": vars(evidence._mean),
            "traces": _summed_traces(net) if training else None,
            "ascents": [ascent.memory() for ascent in _ascents(net)],
        },
        "generators": [_generator_state(state) for state in _generators(net)],
        "stopped": training and net.stop_,
    }


def restore(net: SoftEquivariantNet, state: Mapping[str, Any]) -> None:
    """Bring a net, as it was built, into a state of :func:`snapshot`."""
    device = next(net.module_.parameters()).device
    tensors = dict(net.module_.named_parameters())
    net.module_.load_state_dict(state["network"])
    net.prior_.load_state_dict(state["prior"])
    net.criterion_ = net.criterion_.with_log_hyperparameters(state["noise"])
    _restore_optimizer(net.optimizer_, state["optimizer"], tensors)
    if state["decays"] is not None:
        net.decay_ = [(tensors[name], *rest) for name, *rest in state["decays"]]
    net.history_.clear()
    net.history_.extend(rows(state["history"]))
    course, found = net.course, state["course"]
    course.start = start_from(found["start"])
    course.rate, course.plateau = LearningRate(**found["rate"]), Plateau(**found["plateau"])
    course.holding = found["holding"]
    course.converged, course.capped = found["converged"], found["capped"]
    course.spare_starts = found["spare_starts"]
    course.mean, course.best = _mean(found["mean"], device), found["best"]
    evidence, found = course.evidence, state["evidence"]
    evidence.burn_in = found["burn_in"]
    evidence.ramp, evidence.ramp_from = found["ramp"], found["ramp_from"]
    evidence.state = found["state"]
    evidence._slopes, evidence._mean = found["slopes"], _mean(found["mean"], device)
    if found["traces"] is not None:
        # They are sums over processes, of which one has them from now on.
        own = float(net.processes_.rank == 0)
        evidence._traces = found["traces"].to(device) * own
    for ascent, memory in zip(_ascents(net), found["ascents"], strict=True):
        ascent.recall(memory)
    for generator, numbers in zip(_generators(net), state["generators"], strict=True):
        generator.set_state(numbers)


def _plain_state(state: State) -> State:
    return dict(state[0]), dict(state[1]), state[2]


def _mean(found: Mapping[str, Any], device: torch.device) -> WeightMean:
    mean = WeightMean()
    mean.count = found["count"]
    mean.weights = {name: weight.to(device) for name, weight in found["weights"].items()}
    return mean


def _summed_traces(net: SoftEquivariantNet) -> torch.Tensor | None:
    traces = net.course.evidence._traces
    if traces is not None:
        traces = traces.clone()
        net.processes_.add(traces)
    return traces


def _ascents(net: SoftEquivariantNet) -> list[Ascent]:
    """Those of precisions and lengthscales, as far as there are."""
    evidence = net.course.evidence
    found = [evidence.solver.ascent] if isinstance(evidence.solver, AdamSolver) else []
    return found + ([] if evidence.lengthscales is None else [evidence.lengthscales.ascent])


def _generators(net: SoftEquivariantNet) -> list[np.random.RandomState]:
    found = (net.iterator_train__random_state, net.iterator_train__augment_state)
    return [generator for generator in found if generator is not None]


def _generator_state(generator: np.random.RandomState) -> tuple:
    name, keys, *rest = generator.get_state(legacy=True)
    return name, np.asarray(keys).tolist(), *rest


def _optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    groups, moments = [], {}
    for group in optimizer.param_groups:
        settings = {name: value for name, value in group.items() if name != "params"}
        groups.append((settings, [names[id(parameter)] for parameter in group["params"]]))
    for parameter, state in optimizer.state.items():
        # K-FAC's inverses are those of its factors: they are computed again.
        kept = {name: value for name, value in state.items() if name != "inverse"}
        if kept:
            moments[names[id(parameter)]] = kept
    return {"groups": groups, "moments": moments}


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    optimizer.param_groups[:] = [
        {**settings, "params": [tensors[name] for name in names]}
        for settings, names in state["groups"]
    ]
    optimizer.state.clear()
    for name, moments in state["moments"].items():
        device = tensors[name].device
        optimizer.state[tensors[name]] = {
            key: value.to(device) if isinstance(value, torch.Tensor) else value
            for key, value in moments.items()
        }


def plain_start(start: Start) -> dict[str, Any] | None:
    """A start as plain values, None for the joint one."""
    if isinstance(start, JointStart):
        return None
    group = None if start.group is None else start.group.name
    return {"group": group, "released": dict(start.released), "low": dict(start.low)}


def start_from(found: Mapping[str, Any] | None) -> Start:
    """The start of :func:`plain_start`."""
    if found is None:
        return JointStart()
    group = _GROUPS.get(found["group"])
    return SymmetricStart(group, released=dict(found["released"]), low=dict(found["low"]))


def columns(history: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the epochs have noted, by name, with the rows that have it; not that of batches.

    Of what a user's callbacks have noted numbers and strings only: others may not be saved.
    """
    listed = [{name: _plain(value, name) for name, value in row.items()} for row in history]
    noted: dict[str, dict[int, Any]] = {}
    for i, row in enumerate(listed):
        for name, value in row.items():
            if value is not None:
                noted.setdefault(name, {})[i] = value
    return {
        "n_epochs": len(listed),
        "figures": {
            name: (np.array(list(by_row)), _column(list(by_row.values())))
            for name, by_row in noted.items()
        },
    }


def _plain(value: Any, name: str) -> Any:
    """A value that can be written, None for others."""
    if name == "event_noise":  # ours: a list of as many numbers in each epoch
        return value
    if isinstance(value, np.generic):
        value = value.item()
    # Of classes derived from these more than the value would be written.
    return value if type(value) in (bool, int, float, str) else None


def _column(values: list[Any]) -> np.ndarray | list[Any]:
    """An array of values of one type, or a list: an array would make them all of one."""
    large = any(type(value) is int and abs(value) > INT_MAX for value in values)
    return values if len({type(value) for value in values}) > 1 or large else np.array(values)


def rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The epochs of :func:`columns`."""
    found: list[dict[str, Any]] = [{"batches": []} for _ in range(columns["n_epochs"])]
    for name, (where, values) in columns["figures"].items():
        values = values if isinstance(values, list) else np.asarray(values).tolist()
        for i, value in zip(np.asarray(where).tolist(), values, strict=True):
            found[i][name] = value
    return found


# ── which fit it is


def data_digests(
    X: np.ndarray, y: np.ndarray, weights: np.ndarray, shape: tuple[int, int, int]
) -> dict[str, str]:
    """Digests of data, as they are known again by.

    Parameters
    ----------
    X : ndarray of shape (n, C·H·W)
    y : ndarray of shape (n,)
    weights : ndarray of shape (n,)
        Without those of classes, which are a parameter.
    shape : tuple (C, H, W)
    """
    classes, codes = np.unique(y, return_inverse=True)
    return {
        "X": _data_digest(str((shape, X.shape, X.dtype.str)), X),
        "y": _data_digest(repr(classes.tolist()), codes),
        "sample_weight": _data_digest("", weights),
    }


def _data_digest(text: str, values: np.ndarray) -> str:
    found = hashlib.sha256(text.encode())
    found.update(np.ascontiguousarray(values).data)
    return found.hexdigest()


def identity(
    parameters: Mapping[str, Any], data: TrainingData, previous: SoftEquivariantNet | None
) -> dict[str, str]:
    """What a fit is known again by: all that decides its result, each entry as a string.

    Parameters
    ----------
    parameters : mapping
        The estimator's.
    data : TrainingData
    previous : SoftEquivariantNet or None
        What training begins from with ``warm_start``.

    Raises
    ------
    ValueError
        If a parameter cannot be known again in another process; it names it.
    """
    found = {name: _described(name, v) for name, v in parameters.items() if name not in OTHER}
    return {
        **found,
        **data.digests,
        "device": data.inputs.device.type,
        "dtype": str(data.inputs.dtype).removeprefix("torch."),
        "the model to go on from": "" if previous is None else _model_digest(previous),
        "the version of sklearn_softeq": __version__,
        "the version of torch": torch.__version__,
    }


def _model_digest(net: SoftEquivariantNet) -> str:
    course, evidence = net.course, net.course.evidence
    states = dict(net.module_.state_dict()), dict(net.prior_.state_dict())
    figures = (course.holding, evidence.ramp, evidence.ramp_from, len(net.history))
    noise = net.criterion_.log_hyperparameters()
    return digest((*states, plain_start(course.start), *figures, *noise))


def _described(name: str, value: Any) -> str:
    """A parameter in words that are the same in another process."""
    if name == "pathways":
        value = tuple(map(str, check_names(value, PATHWAYS, name)))  # in whatever form
    if name == "image_shape" and value is not None:
        value = tuple(map(int, value))
    if isinstance(value, np.generic):
        value = value.item()
    try:
        return described(value)
    except IndescribableError as error:
        raise ValueError(
            f"With checkpoint_dir a fit has to be known again by its parameters, but {name}="
            f"{value!r} cannot be told from others in another process: {error}. Give a function, "
            "or an instance of a class that can be pickled; or set checkpoint_dir=None."
        ) from error


# ── where it is kept


class Run:
    """The folder of a fit, with the last of its records in memory.

    Parameters
    ----------
    folder : Path
    identity : dict of str to str
        As from :func:`identity`.
    record : dict or None
        The last one on disk, if there is any.
    processes : Processes
        Those that train together; the first one writes.

    Attributes
    ----------
    seeds : list of int or None
        Of all that is random in the fit; None before it has begun.
    state : dict or None
        What there is to go on from.
    trials : dict or None
        Scores of the trials before training, once they are over.
    outcome : dict or None
        What came of a fit that is over.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, str],
        record: dict[str, Any] | None,
        processes: Processes,
    ):
        self.folder = folder
        self.processes = processes
        self.fixed = {"identity": identity, "threads": torch.get_num_threads()}
        record = record or {**EMPTY, **self.fixed}
        self.fixed["threads"] = record["threads"]
        self.number, self.seeds = record["number"], record["seeds"]
        self.trials, self.state = record["trials"], record["state"]
        self.outcome = record["outcome"]

    def begin(self, seeds: list[int]) -> list[int]:
        """Take these seeds, if the fit has none yet; those that it has."""
        if self.seeds is None:
            self.seeds = seeds
            self._write({})
        return self.seeds

    def epochs_left(self, max_epochs: int) -> int:
        """Epochs that training may still take."""
        if self.state is None:
            return max_epochs
        done = self.state["history"]["n_epochs"]
        return 0 if self.state["stopped"] else max_epochs - done

    def keep(
        self, net: SoftEquivariantNet, trials: Mapping[str, float], outcome: dict | None = None
    ) -> None:
        """Write the present state; what cannot be written ends no training.

        Warns
        -----
        UserWarning
            If it cannot be written.
        """
        record = {"trials": dict(trials), "state": snapshot(net), "outcome": outcome}
        try:
            self._write(record)
        except OSError as error:
            warn(
                f"A checkpoint could not be written ({error}). Training goes on; if it breaks off, "
                "the fit will go on from the last one that could be.",
            )

    def _write(self, record: dict[str, Any]) -> None:
        """The first process writes a record, over the older of the two that there are."""
        if self.processes.rank > 0:
            return
        number = self.number + 1
        whole = {**EMPTY, **self.fixed, "seeds": self.seeds, **record, "number": number}
        write(self.folder / FILES[number % len(FILES)], whole)
        self.number = number


def open_run(
    folder: str | os.PathLike, identity: dict[str, str], is_clone: bool, processes: Processes
) -> Run:
    """A fit's place on disk, which is made if there is none.

    Parameters
    ----------
    folder : str or path-like
        The user's ``checkpoint_dir``.
    identity : dict of str to str
        As from :func:`identity`.
    is_clone : bool
        Whether the estimator is a clone. An estimator that a user has made has one fit, and another
        one in its folder is a mistake. Those of a search differ in data and parameters by design;
        all are clones, so that it can be told without asking, and each has a sub-folder.
    processes : Processes
        The first one reads and writes for all.

    Raises
    ------
    ValueError
        If it is no name of a folder, or the folder has another fit in it; it names what differs.
    OSError
        If nothing can be written there; FileExistsError if a file of something else is in the way.
    """
    place = _home(folder)
    place = place / digest(identity)[:16] if is_clone else place
    record = processes.by_first(lambda: _last_record(place, identity))
    return Run(place, identity, record, processes)


def _home(folder: str | os.PathLike) -> Path:
    if not os.fspath(folder):
        raise ValueError("checkpoint_dir='' names no folder; give '.' for the working directory.")
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise ValueError(f"checkpoint_dir={folder!r} has no home directory: {error}") from error


def _last_record(folder: Path, identity: dict[str, str]) -> dict[str, Any] | None:
    """The last record of a fit, if there is any, in a folder that can be written to."""
    found = max(_records(folder), key=lambda record: record["number"], default=None)
    if found is not None:
        _refuse_others(folder, found["identity"], identity)
        if found["outcome"] is not None:
            return found
        _compare_threads(found["threads"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            _tidy(folder)
    except OSError as error:
        raise OSError(
            f"Nothing can be written to checkpoint_dir ({error}). Give a folder in which files can "
            "be made, or None for a fit that leaves no file."
        ) from error
    return found


def _records(folder: Path) -> list[dict[str, Any]]:
    """What can be read; of the rest a warning is given."""
    found = []
    for path in (folder / name for name in FILES):
        try:
            found.append(_checked(path, read(path)))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except ForeignError as error:
            raise FileExistsError(
                f"{error} It would be written over: move it away, or give a checkpoint_dir of its "
                "own."
            ) from error
        except DamagedError as error:
            warn(
                f"{error} It is left aside; the fit goes on from the one before, if there is any.",
            )
    return found


def _checked(path: Path, record: Any) -> dict[str, Any]:
    if not isinstance(record, dict) or record.keys() != RECORD:
        raise DamagedError(f"{path} is no checkpoint.")
    return record


def _tidy(folder: Path) -> None:
    """Take away what killed processes have left."""
    for name in FILES:
        for part in folder.glob(f".{name}.*.part"):
            if time.time() - part.stat().st_mtime > LITTER:
                part.unlink(missing_ok=True)


def _compare_threads(then: int) -> None:
    now = torch.get_num_threads()
    if now != then:
        warn(
            f"This fit was begun with {then} threads and goes on with {now}, which round "
            "otherwise: its last digits will not be those of a fit that was never broken off.",
        )


def _refuse_others(folder: Path, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise an error if a folder has another fit in it."""
    differing = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if not differing:
        return
    said = [
        f"{name} has changed"
        if name in DIGESTS
        else f"{name} was {then.get(name, 'unknown')} and is {now.get(name, 'unknown')}"
        for name in differing
    ]
    raise ValueError(
        f"The folder {str(folder)!r} holds another fit: {'; '.join(said)}. Call fit as it was "
        "begun to go on with that one, or give this one a checkpoint_dir of its own. (Fits of a "
        "clone, as a search makes them, have sub-folders of their own.)"
    )


class Checkpoint(Callback):
    """Brings a net into the state of its run as training begins, and keeps its states.

    It stands last among the callbacks, so that what the others do at the end of an epoch is kept,
    too. A state is written where writing has taken no more than :data:`SHARE` of the time.

    Parameters
    ----------
    run : Run
    trials : dict of str to float
        Scores of the trials before training.
    verbose : bool
        Whether to say where training goes on.
    """

    def __init__(self, run: Run, trials: Mapping[str, float], verbose: bool = False):
        self.run = run
        self.trials = trials
        self.verbose = verbose

    def on_train_begin(self, net, **kwargs):
        if self.run.state is None:
            self._keep(net)  # trials are not for a second time
            return
        restore(net, self.run.state)
        self.run.state = None
        self._cost, self._kept = 0.0, time.monotonic()
        if self.verbose and self.run.processes.rank == 0:
            print(f"goes on after epoch {len(net.history)}, from {self.run.folder}")

    def on_epoch_end(self, net, **kwargs):
        due = time.monotonic() - self._kept >= self._cost / SHARE
        if self.run.processes.agreed(due):
            self._keep(net)

    def _keep(self, net: SoftEquivariantNet) -> None:
        begun = time.monotonic()
        self.run.keep(net, self.trials)
        self._kept = time.monotonic()
        self._cost = self._kept - begun
