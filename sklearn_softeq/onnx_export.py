"""A fitted estimator as an ONNX graph, from images as the user has them to its predictions."""

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ._version import __version__

__all__ = ["Output", "Unscaled", "exported", "labels_as_json"]

#: What torch's exporter stands on.
NEEDED = ("onnx", "onnxscript")


class Output(NamedTuple):
    """What becomes of the outputs of a network.

    Parameters
    ----------
    name : str
        Of the graph's output.
    link : nn.Module
        From the network's outputs, (n, K).
    metadata : dict of str to str
        What a reader of the file has to know beside.
    """

    name: str
    link: nn.Module
    metadata: dict[str, str]


class Unscaled(nn.Module):
    """f · scale + mean, in float32.

    Parameters
    ----------
    mean, scale : ndarray of shape (K,)
        Of the targets.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, mean: np.ndarray, scale: np.ndarray):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs * self.scale + self.mean


class Predictions(nn.Module):
    """link(f((x − mean) / scale)), in float32 on the CPU.

    Parameters
    ----------
    network : nn.Module
        f; it is copied.
    mean, scale : tensor of shape (C, 1, 1)
        Of the channels.
    link : nn.Module
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self, network: nn.Module, mean: torch.Tensor, scale: torch.Tensor, link: nn.Module
    ):
        super().__init__()
        self.link = link
        self.network = copy.deepcopy(network).to("cpu", torch.float32)
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", scale.float())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.link(self.network((images - self.mean) / self.scale))


def labels_as_json(labels: np.ndarray) -> str:
    """Labels as a list in JSON, of which what JSON has no word for, such as dates, are strings."""
    plain = labels.astype(str) if labels.dtype.kind in "mM" else labels
    return json.dumps(plain.tolist(), default=str)


def exported(estimator: Any, output: Output) -> Any:
    """The ONNX program of a fitted estimator.

    See :meth:`SoftEquivariantClassifier.export_onnx`.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"export_onnx needs the packages {' and '.join(NEEDED)}, and {' and '.join(missing)} "
            "cannot be found. Install them with: pip install 'sklearn-softeq[onnx]'"
        )
    mean, scale = (
        torch.tensor(figure)[:, None, None]
        for figure in (estimator.channel_mean_, estimator.channel_scale_)
    )
    model = Predictions(estimator.module_, mean, scale, output.link).eval()
    with _quiet():
        program = torch.onnx.export(
            model,
            (torch.zeros(2, *estimator.image_shape_),),
            input_names=["images"],
            output_names=[output.name],
            dynamic_shapes={"images": {0: "n"}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None, "it is written by the caller"
    batch = program.model.graph.inputs[0].shape
    assert batch is not None
    assert not isinstance(batch[0], int), "a part of the network has settled on a batch size"
    program.model.metadata_props.update(output.metadata, sklearn_softeq=__version__)
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages not needed here, and of its own future."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(before)
