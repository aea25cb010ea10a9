"""Predictions from the MAP weights."""

import torch
from torch import nn

__all__ = ["log_odds", "map_outputs"]

_TILE = 16  # rows; a multiple of the tile of every matrix kernel that was met


@torch.no_grad()
def map_outputs(network: nn.Module, inputs: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Outputs f of the network, shape (n, K), float64 on the CPU.

    Every batch is padded to one number of rows, a multiple of 16: matrix products choose their
    order of summation by the shapes, and another one for rows at the edge of a tile, so only then
    a row's result does not depend, to the last bit, on the rows that it is predicted with.

    Parameters
    ----------
    network : nn.Module
        On any device.
    inputs : tensor of shape (n, C, H, W)
        On the CPU; batches are moved to the device of the network.
    batch_size : int
        Rows in one pass, rounded up to a multiple of 16.
    """
    device = next(network.parameters()).device
    n_rows = -(-batch_size // _TILE) * _TILE
    outputs = []
    for batch in inputs.split(n_rows):
        padded = batch.new_zeros(n_rows, *batch.shape[1:])
        padded[: len(batch)] = batch
        outputs.append(network(padded.to(device))[: len(batch)].cpu().double())
    return torch.cat(outputs)


def log_odds(outputs: torch.Tensor) -> torch.Tensor:
    """log p_k − log(1 − p_k) of softmax probabilities, shape (n, K); (n,) for two classes.

    For one class the odds are infinite; zeros are returned, so that there is no class to prefer.
    """
    n_classes = outputs.shape[1]
    if n_classes == 1:
        return torch.zeros(len(outputs), dtype=outputs.dtype)
    if n_classes == 2:
        return outputs[:, 1] - outputs[:, 0]
    odds = []
    for k in range(n_classes):
        others = torch.cat([outputs[:, :k], outputs[:, k + 1 :]], 1)
        odds.append(outputs[:, k] - others.logsumexp(1))  # Eq. log odds
    return torch.stack(odds, 1)
