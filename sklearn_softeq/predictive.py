"""Predictions from the MAP weights, and averaged over the posterior of the weights."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .memory import in_fewer_rows
from .posterior import TILE, Posterior, output_covariance, rows_of_a_prediction
from .twins import twin_of

__all__ = [
    "PREDICTIVES",
    "laplace_outputs",
    "laplace_variances",
    "log_odds",
    "map_outputs",
    "moderated",
    "sampled",
]

#: How a prediction uses the posterior: not at all, or by integrating over it.
PREDICTIVES = ("map", "laplace")

#: Numbers of logits that are drawn at a time.
DRAWN_NUMBERS = 2**21

#: What is added to the diagonal of a covariance before it is decomposed, in units of its trace and
#: of the relative rounding of the network; ten times more as often as that is not enough.
JITTER = 8.0

_SEED = 0  # of the samples: the same for all rows and all calls


@torch.no_grad()
def map_outputs(network: nn.Module, inputs: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Outputs f of the network, shape (n, K), float64 on the CPU.

    Every batch is padded to one number of rows, a multiple of 16: matrix products choose their
    order of summation by the shapes, and another one for rows at the edge of a tile, so only then
    a row's result does not depend, to the last bit, on the rows that it is predicted with. Where
    memory runs out that number is halved, for all rows of the call; last digits may be others then.

    Parameters
    ----------
    network : nn.Module
        On any device.
    inputs : tensor of shape (n, C, H, W)
        On the CPU; batches are moved to the device of the network.
    batch_size : int
        Rows in one pass, rounded up to a multiple of 16.

    Raises
    ------
    MemoryError, torch.OutOfMemoryError, RuntimeError
        What memory that does not do for 16 rows raises.

    Warns
    -----
    UserWarning
        If memory did not do for so many rows.
    """
    if network.training:
        network = twin_of(network).eval()  # the mode in which maps keep to one order of summation
    return _in_batches(lambda rows: network(rows), network, inputs, -(-batch_size // TILE) * TILE)


def laplace_outputs(
    network: nn.Module,
    posterior: Posterior,
    inputs: torch.Tensor,
    n_outputs: int,
    n_samples: int | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Outputs whose softmax is the predictive of the linearised network, (n, K), float64.

    p(y | x) = ∫ softmax(f) N(f | f*, T C) df, in closed form or by samples. Batches are as in
    :func:`map_outputs`, of so many rows as their sizes allow; so is what happens, is raised and
    warned of where memory runs out.

    Parameters
    ----------
    network : nn.Module
        On any device.
    posterior : Posterior
        Of its weights, on the same device.
    inputs : tensor of shape (n, C, H, W)
        On the CPU.
    n_outputs : int
        K.
    n_samples : int, optional
        Of the logits of each row; default: the closed form of :func:`moderated`.
    temperature : float, default=1.0
        T, which multiplies the covariance of the weights. Towards 0 all of it is the MAP.

    References
    ----------
    A. Immer, M. Korzepa, M. Bauer, "Improving predictions of Bayesian neural nets via local
    linearization", AISTATS 2021. F. Wenzel et al., "How good is the Bayes posterior in deep neural
    networks really?", ICML 2020: the temperature.
    """
    closed = n_samples is None
    eye = torch.eye(n_outputs, dtype=torch.float64, device=next(network.parameters()).device)
    # A shift of all logits changes no probability, and the data do not determine it: without it
    # the prior's large variance of a mean logit does not drown that of their differences.
    directions = eye - 1.0 / n_outputs
    network = twin_of(network).eval()  # as above; what the maps see is found out by hooks

    def outputs(rows: torch.Tensor) -> torch.Tensor:
        found, covariance = output_covariance(network, posterior, rows, directions, closed)
        covariance *= temperature
        logits = found.double() @ directions
        if n_samples is None:
            return moderated(logits, covariance)
        return sampled(logits, covariance, n_samples, torch.finfo(found.dtype).eps)

    n_rows = rows_of_a_prediction(network, posterior, 1 if closed else n_outputs)
    return _in_batches(outputs, network, inputs, n_rows)


def laplace_variances(
    network: nn.Module, posterior: Posterior, inputs: torch.Tensor, n_outputs: int
) -> torch.Tensor:
    """Variances of the outputs of the linearised network, (n, K), float64 on the CPU.

    Parameters
    ----------
    network, posterior, inputs, n_outputs
        As of :func:`laplace_outputs`; the same is said there of batches.
    """
    device = next(network.parameters()).device
    directions = torch.eye(n_outputs, dtype=torch.float64, device=device)
    network = twin_of(network).eval()  # other threads may predict with the same one

    def variances(rows: torch.Tensor) -> torch.Tensor:
        return output_covariance(network, posterior, rows, directions, diagonal=True)[1]

    return _in_batches(variances, network, inputs, rows_of_a_prediction(network, posterior, 1))


def _in_batches(
    outputs: Callable[[torch.Tensor], torch.Tensor],
    network: nn.Module,
    inputs: torch.Tensor,
    n_rows: int,
) -> torch.Tensor:
    """What a function finds for the rows of each batch, all padded to one number of rows."""
    device = next(network.parameters()).device

    def of_all(n_rows: int) -> torch.Tensor:
        found = []
        for batch in inputs.split(n_rows):
            padded = batch.new_zeros(n_rows, *batch.shape[1:])
            padded[: len(batch)] = batch
            found.append(outputs(padded.to(device))[: len(batch)].cpu().double())
        return torch.cat(found)

    return in_fewer_rows(of_all, n_rows, min(n_rows, TILE))


def moderated(logits: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Logits κ_k z_k, κ_k = (1 + π/8 v_k)^−½, whose softmax stands for the integral.

    MacKay's approximation of the integral of a sigmoid, which follows from that of a probit. Here
    z_k is a logit minus the mean of all, and v_k the variance of a logit minus the mean of the
    *others*: of two classes that is the variance of their difference, and the result is MacKay's
    for the two; and a common shift of the logits, however uncertain, changes nothing.

    Parameters
    ----------
    logits : tensor of shape (n, K)
        z, of mean zero in each row.
    variance : tensor of shape (n, K)
        Of z; v = (K / (K − 1))² times it.

    References
    ----------
    D. MacKay, "The evidence framework applied to classification networks", Neural Computation 4
    (1992). M. Gibbs, "Bayesian Gaussian processes for regression and classification", PhD thesis,
    Cambridge (1997): more classes.
    """
    n_classes = logits.shape[1]
    against_others = (n_classes / max(n_classes - 1, 1)) ** 2 * variance
    return logits * (1 + math.pi / 8 * against_others).rsqrt()  # Eq. moderated logits


def sampled(
    logits: torch.Tensor, covariance: torch.Tensor, n_samples: int, eps: float
) -> torch.Tensor:
    """Logarithm of the mean of softmax(f) over samples f ~ N(z, C), shape (n, K).

    The same standard normal numbers serve every row and every call, so that predictions can be
    repeated and depend on no other row. The error falls with the root of their number.

    Parameters
    ----------
    logits : tensor of shape (n, K)
        z.
    covariance : tensor of shape (n, K, K)
        C.
    n_samples : int
    eps : float
        Relative rounding of the covariance.
    """
    roots = _root(covariance, eps)
    total = torch.full_like(logits, -math.inf)
    for drawn in _standard_normal(n_samples, logits):
        f = logits[:, None] + drawn @ roots.transpose(1, 2)  # (n, samples, K)
        total = torch.logaddexp(total, f.log_softmax(2).logsumexp(1))
    return total - math.log(n_samples)  # Eq. sampled predictive


def _standard_normal(n_samples: int, like: torch.Tensor) -> Iterator[torch.Tensor]:
    """Standard normal numbers (samples, K), a few samples at a time."""
    generator = torch.Generator().manual_seed(_SEED)
    at_once = max(DRAWN_NUMBERS // like.numel(), 1)
    for begin in range(0, n_samples, at_once):
        size = (min(at_once, n_samples - begin), like.shape[1])
        yield torch.randn(size, generator=generator, dtype=torch.float64).to(like)


def _root(covariance: torch.Tensor, eps: float) -> torch.Tensor:
    """L with L Lᵀ = C + jitter, shape (n, K, K); C is singular, and rounded."""
    trace = covariance.diagonal(dim1=1, dim2=2).sum(1)  # (n,)
    tiny = torch.finfo(covariance.dtype).tiny
    jitter = (JITTER * eps * trace).clamp_min(tiny)
    eye = torch.eye(covariance.shape[1], dtype=covariance.dtype, device=covariance.device)
    while True:
        root, failed = torch.linalg.cholesky_ex(covariance + jitter[:, None, None] * eye)
        again = (failed > 0) & (jitter < trace)  # what is not a number fails for ever
        if not again.any():
            return root
        jitter = torch.where(again, 10 * jitter, jitter)


def log_odds(outputs: torch.Tensor) -> torch.Tensor:
    """log p_k − log(1 − p_k) of softmax probabilities, shape (n, K); (n,) for two classes.

    For one class the odds are infinite; zeros are returned, so that there is no class to prefer.
    """
    n_classes = outputs.shape[1]
    if n_classes == 1:
        return torch.zeros(len(outputs), dtype=outputs.dtype)
    if n_classes == 2:
        return outputs[:, 1] - outputs[:, 0]
    log_p = outputs.log_softmax(1)
    largest = log_p.argmax(1, keepdim=True)
    # Where p ≤ ½ its complement is exact to the last digits; of the largest one it is the sum of
    # the others.
    others = log_p.scatter(1, largest, -torch.inf).logsumexp(1, keepdim=True)
    complement = torch.log1p(-log_p.exp()).scatter(1, largest, others)
    return log_p - complement  # Eq. log odds
