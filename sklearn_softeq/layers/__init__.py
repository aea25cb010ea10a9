"""Layers as linear maps that are used at shared positions in blocks, and their sums.

``contract`` says what a layer is, ``torus`` moves feature maps; ``fc``, ``factored``, ``conv``,
``sparse`` and ``group`` hold one structure of weights each; ``pathways`` has the table of them and
adds them up.
"""

from .contract import Grid, LayerSpec, Pathway, SharedLinear, in_blocks, outer, strided
from .conv import Conv
from .factored import FactoredFC, FactorU, FactorV
from .fc import FC, PooledFC
from .group import GroupConv
from .pathways import (
    PATHWAYS,
    PathwayKind,
    PathwaySum,
    keep_largest_grid,
    less_symmetric,
    untrained_free_layer,
)
from .sparse import SparseConv, SparseFC, SparseU, SparseV
from .torus import shift

__all__ = [
    "FC",
    "PATHWAYS",
    "Conv",
    "FactorU",
    "FactorV",
    "FactoredFC",
    "Grid",
    "GroupConv",
    "LayerSpec",
    "Pathway",
    "PathwayKind",
    "PathwaySum",
    "PooledFC",
    "SharedLinear",
    "SparseConv",
    "SparseFC",
    "SparseU",
    "SparseV",
    "in_blocks",
    "keep_largest_grid",
    "less_symmetric",
    "outer",
    "shift",
    "strided",
    "untrained_free_layer",
]
