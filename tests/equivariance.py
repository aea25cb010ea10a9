"""How far a map is from commuting with a point group and the shifts of the grid together."""

from itertools import product

import torch

from sklearn_softeq.groups import P1, Translation

TRANSLATION = Translation()


def moved(inputs, group, axis=P1):
    """The inputs moved by each element of a group and then by each shift of their grid."""
    shifts = list(product(*map(range, inputs.shape[2:])))
    return {
        (g, t): TRANSLATION.act(group.act(inputs, g, axis), t)
        for g, t in product(group.matrices, shifts)
    }


def joint_errors(layer, inputs, group, axes=(P1, P1), stride=(1, 1)):
    """Largest relative error of a row for each element followed by each shift.

    Axes are the groups of the orientations of input and output. At a stride the output of each
    row may answer with any of the compatible shifts.
    """
    outputs, moves, errors = layer(inputs), moved(inputs, group, axes[0]), {}
    answers = layer(torch.cat(list(moves.values()))).unflatten(0, (-1, len(inputs)))
    for (g, t), answer in zip(moves, answers, strict=True):
        turned = group.act(outputs, g, axes[1])
        candidates = [
            (answer - TRANSLATION.act(turned, s)).flatten(1).norm(dim=1)
            for s in TRANSLATION.output_elements(t, stride)
        ]
        best = torch.stack(candidates).amin(0) / outputs.flatten(1).norm(dim=1)
        errors[g, t] = best.max().item()
    return errors


def assert_equivariant(layer, inputs, group, axes=(P1, P1), stride=(1, 1)):
    errors = joint_errors(layer, inputs, group, axes, stride)
    assert max(errors.values()) < 1e-10, max(errors, key=errors.get)
