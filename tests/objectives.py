"""The evidence of a network as it stands; linear models at the exact mode of their posterior."""

import torch
from cases import chain
from references import linear_regression_log_evidence, linear_regression_map

from sklearn_softeq.curvature import kronecker_factors
from sklearn_softeq.hyperparameters import LayerwisePrior, squared_norms
from sklearn_softeq.kronecker import spectra
from sklearn_softeq.likelihoods import Gaussian
from sklearn_softeq.marginal_likelihood import LaplaceEvidence


def laplace(network, likelihood, batch, prior, **options):
    """The objective of a network as it stands."""
    apart = len(likelihood.log_hyperparameters()) > 1
    found = kronecker_factors(network, likelihood, [batch], apart=apart, **options)
    norms = squared_norms(dict(network.named_parameters()))
    eigenvalues = spectra(found.factors, parts=found.parts)
    return LaplaceEvidence(
        found.log_likelihood,
        eigenvalues,
        norms,
        prior.index,
        slopes=found.slopes,
        factors=found.factors,
        noise=likelihood.noise(found.log_likelihoods, batch[2].sum().item()),
    )


def ascend(solver, objective, log_precision, n_steps):
    for _ in range(n_steps):
        log_precision = solver.step(objective, log_precision)
    return log_precision


class LinearModel:
    """A network that is linear in its weights, at the exact mode of its posterior."""

    def __init__(self, layer, inputs, targets):
        self.network = chain(layer).double()
        self.inputs, self.targets = inputs, targets
        self.tensors = dict(self.network.named_parameters())
        self.prior = LayerwisePrior(self.tensors)
        self.linearise()

    @torch.no_grad()
    def linearise(self):
        """Look at the network: at first, and when more than its weights has changed."""
        before = torch.cat([w.flatten() for w in self.tensors.values()])
        units = torch.eye(len(before), dtype=torch.float64)
        columns = [self.set_weights(unit).network(self.inputs).flatten() for unit in units]
        self.design = torch.stack(columns, 1)  # (n·K, P)
        self.set_weights(before)

    @torch.no_grad()
    def set_weights(self, vector):
        parts = vector.split([w.numel() for w in self.tensors.values()])
        for tensor, part in zip(self.tensors.values(), parts, strict=True):
            tensor.copy_(part.view(tensor.shape))
        return self

    def column_precisions(self):
        """δ of every column of the design."""
        values = self.prior.precisions()
        columns = [
            torch.full((w.numel(),), values[n], dtype=torch.float64)
            for n, w in self.tensors.items()
        ]
        return torch.cat(columns)

    def of_rows(self, noise_variance):
        """σ² of each row of the design, if there is one for each output."""
        if not isinstance(noise_variance, tuple):
            return noise_variance
        return torch.tensor(noise_variance, dtype=torch.float64).repeat(len(self.inputs))

    def to_mode(self, noise_variance):
        solution = linear_regression_map(
            self.design,
            self.targets.flatten(),
            self.column_precisions(),
            self.of_rows(noise_variance),
        )
        self.set_weights(solution)

    def objective(self, noise_variance, learned=False, **options):
        weights = torch.ones(len(self.inputs), dtype=torch.float64)
        batch = (self.inputs, self.targets, weights)
        likelihood = Gaussian(noise_variance, learned)
        return laplace(self.network, likelihood, batch, self.prior, **options)

    def hyperparameters(self, noise_variance):
        """log δ, and log 1/σ² of each noise as the last ones."""
        noise = Gaussian(noise_variance, True).log_hyperparameters()
        return torch.cat([self.prior.log_precision, self.prior.log_precision.new_tensor(noise)])

    def closed_form(self, noise_variance):
        return linear_regression_log_evidence(
            self.design,
            self.targets.flatten(),
            self.column_precisions(),
            self.of_rows(noise_variance),
        )
