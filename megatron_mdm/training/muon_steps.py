"""Muon: hidden matrices take steps in which every direction counts alike, AdamW steps the rest.

Sources: https://kellerjordan.github.io/posts/muon (the method, and its scale); arXiv 2502.16982
(the scale with which AdamW's rate carries over); arXiv 2505.16932 (Polar Express).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_mdm.config.parameter_groups import (
    OptimizedParameter,
    ParameterGroups,
    ParameterRole,
    Piece,
)
from megatron_mdm.training.muon import Coefficients, MuonConfig, Scale

# Of one iteration after the other; all later ones have the last.
_POLYNOMIALS: dict[Coefficients, tuple[tuple[float, float, float], ...]] = {
    "quintic": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        (8.15655, -22.48329, 15.87877),
        (4.04293, -2.80892, 0.50002),
        (3.89167, -2.77248, 0.50606),
        (3.28575, -2.36813, 0.46449),
        (2.34654, -1.70978, 0.42324),
    ),
}


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized, for hidden matrices, and AdamW for all others.

    M = mu M + (1 - mu) G; U = (1 - mu) G + mu M with Nesterov's momentum, M without;
    W = W (1 - lr decay) - lr scale NS(U).

    Args:
        groups: The parameters.
        section: The settings.
    """

    def __init__(self, groups: ParameterGroups, section: MuonConfig) -> None:
        hidden = [one.tensor for one in groups.parameters if one.role == "hidden"]
        others = [one.tensor for one in groups.parameters if one.role != "hidden"]
        made = [
            {"params": tensors, "is_hidden": is_hidden}
            for tensors, is_hidden in ((hidden, True), (others, False))
            if tensors
        ]
        super().__init__(made, {"lr": section.lr, "weight_decay": section.weight_decay})
        self._section, self._wholes = section, groups.wholes
        self._lr_factors: dict[ParameterRole, float] = {
            "embedding": section.embedding_lr_factor,
            "output": section.output_lr_factor,
            "vector": section.vector_lr_factor,
        }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Makes a step; gradients of hidden matrices are overwritten."""
        del closure
        for group in self.param_groups:
            tensors = [one for one in group["params"] if one.grad is not None]
            if not tensors:
                continue
            if group["is_hidden"]:
                self._step_hidden(tensors, group["lr"], group["weight_decay"])
            else:
                self._step_others(tensors, group["lr"], group["weight_decay"])

    def _step_hidden(self, tensors: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        mu, directions = self._section.momentum, []
        for tensor in tensors:
            grad, momentum = _get_grad(tensor), self._get_state(tensor, "hidden")["momentum_buffer"]
            momentum.lerp_(grad, 1 - mu)
            # In the place of the gradient, which is of no more use.
            directions.append(
                grad.lerp_(momentum, mu) if self._section.nesterov else grad.copy_(momentum)
            )
        self._wholes.replace(tensors, directions, self._orthogonalize)
        for tensor, direction in zip(tensors, directions, strict=True):
            tensor.mul_(1 - lr * weight_decay).add_(direction, alpha=-lr)

    def _step_others(self, tensors: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        alike: dict[tuple[float, bool], list[tuple[Tensor, Piece]]] = {}
        for tensor in tensors:
            for piece in self._wholes.list_pieces(tensor):
                key = self._lr_factors[piece.parameter.role], piece.parameter.decays
                alike.setdefault(key, []).append((tensor, piece))
            self._get_state(tensor, "vector")
        for (factor, decays), pieces in alike.items():
            states = [self.state[tensor] for tensor, _ in pieces]
            adamw(
                [piece.view(tensor) for tensor, piece in pieces],
                [piece.view(_get_grad(tensor)) for tensor, piece in pieces],
                [piece.view(self.state[tensor]["exp_avg"]) for tensor, piece in pieces],
                [piece.view(self.state[tensor]["exp_avg_sq"]) for tensor, piece in pieces],
                [],
                # It counts them up; pieces of one tensor have one count.
                [state["step"].clone() for state in states],
                fused=True,
                amsgrad=False,
                beta1=self._section.beta1,
                beta2=self._section.beta2,
                lr=lr * factor,
                weight_decay=weight_decay if decays else 0.0,
                eps=self._section.eps,
                maximize=False,
            )
        for tensor in tensors:
            self.state[tensor]["step"] += 1

    def _get_state(self, tensor: Tensor, role: ParameterRole) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[tensor]
        if not state:
            state.update(self._section.initial_state_of(role, tensor))
        return state

    def _orthogonalize(self, parameter: OptimizedParameter, direction: Tensor) -> Tensor:
        """The step of a whole parameter, for a rate of 1."""
        result = torch.empty_like(direction)
        for rows in _list_matrices(parameter, splits=self._section.splits(parameter)):
            self._step_matrix(torch.cat([direction[one] for one in rows]), rows, result)
        return result

    def _step_matrix(self, matrix: Tensor, rows: Sequence[slice], result: Tensor) -> None:
        section = self._section
        step = orthogonalize(matrix, section.ns_steps, section.coefficients)
        step *= find_scale(matrix.shape, section.scale)
        sizes = [one.stop - one.start for one in rows]
        for one, part in zip(rows, step.split(sizes), strict=True):
            result[one] = part


def orthogonalize(matrix: Tensor, num_steps: int, coefficients: Coefficients) -> Tensor:
    """Brings the singular values of a matrix near 1, by Newton-Schulz iterations.

    Args:
        matrix: [rows, columns], float32 or float64.
        num_steps: Iterations.
        coefficients: Of their polynomial. After five iterations singular values that were above
            0.002 of the matrix's norm lie between 0.68 and 1.21 (`quintic`), or between 0.85 and
            1.15 (`polar_express`).

    Returns:
        About U V^T of the matrix U S V^T, in its shape and dtype.

    Source:
        The polynomial a X + b X X^T X + c (X X^T)^2 X: https://kellerjordan.github.io/posts/muon;
        one for each step: arXiv 2505.16932.
    """
    # The product of the short side with itself is the smaller one.
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    polynomials = _POLYNOMIALS[coefficients]
    x = x / (x.norm() + 1e-7 if coefficients == "quintic" else 1.02 * x.norm() + 1e-6)
    for a, b, c in islice(chain(polynomials, repeat(polynomials[-1])), num_steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def find_scale(shape: Sequence[int], scale: Scale) -> float:
    """What the orthogonalized step of a matrix is multiplied by.

    Args:
        shape: Rows and columns of the whole matrix.
        scale: Whose.

    Returns:
        A step whose root mean square is that of AdamW's, about 0.2, or one whose spectral norm
        changes outputs alike whatever the sizes.
    """
    rows, columns = shape
    if scale == "moonlight":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def _list_matrices(parameter: OptimizedParameter, *, splits: bool) -> list[list[slice]]:
    """The rows of each matrix of a parameter, or of all of it as one."""
    if not splits:
        return [[slice(0, parameter.shape[0])]]
    rows: dict[int, list[slice]] = {}
    start = 0
    for matrix, num_rows in parameter.rows:
        rows.setdefault(matrix, []).append(slice(start, start + num_rows))
        start += num_rows
    return list(rows.values())


def _get_grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
