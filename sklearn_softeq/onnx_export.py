"""A fitted classifier as an ONNX graph, from images as the user has them to probabilities."""

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ._version import __version__

__all__ = ["exported"]

#: What torch's exporter stands on.
NEEDED = ("onnx", "onnxscript")


class Probabilities(nn.Module):
    """softmax(f((x − mean) / scale)), in float32 on the CPU.

    Parameters
    ----------
    network : nn.Module
        f; it is copied.
    mean, scale : tensor of shape (C, 1, 1)
        Of the channels.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, network: nn.Module, mean: torch.Tensor, scale: torch.Tensor):
        super().__init__()
        self.network = copy.deepcopy(network).to("cpu", torch.float32)
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", scale.float())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network((images - self.mean) / self.scale).softmax(1)


def exported(clf: Any) -> Any:
    """The ONNX program of a fitted classifier.

    See :meth:`SoftEquivariantClassifier.export_onnx`.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"export_onnx needs the packages {' and '.join(NEEDED)}, and {' and '.join(missing)} "
            "cannot be found. Install them with: pip install 'sklearn-softeq[onnx]'"
        )
    if clf.predictive != "map":
        raise ValueError(
            f"predictive={clf.predictive!r} averages over the posterior, for which there is no "
            'graph. Call set_params(predictive="map") first to export the network itself.'
        )
    figures = (torch.tensor(v)[:, None, None] for v in (clf.channel_mean_, clf.channel_scale_))
    model = Probabilities(clf.module_, *figures).eval()
    with _quiet():
        program = torch.onnx.export(
            model,
            (torch.zeros(2, *clf.image_shape_),),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes={"images": {0: "n"}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None, "it is written by the caller"
    batch = program.model.graph.inputs[0].shape
    assert batch is not None
    assert not isinstance(batch[0], int), "a part of the network has settled on a batch size"
    program.model.metadata_props.update(
        classes=json.dumps(clf.classes_.tolist()), sklearn_softeq=__version__
    )
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
