"""Interpolating noise written out: the whole q, the direct sums, a toy joint by enumeration."""

from __future__ import annotations

import itertools

import numpy as np

JOINT = np.array([[4, 1, 1], [1, 3, 2], [2, 1, 5]]) / 20
N, MASK = 3, 3


def full_q(noise, t: float) -> np.ndarray:
    """q_t(z | x0) as a matrix [x0, z]; the last z is the mask token."""
    at = noise.at(t)
    return np.hstack([at.clean * np.eye(N) + at.uniform, np.full((N, 1), at.mask)])


def weight(noise, t: float, x0: int, z: int) -> float:
    at = noise.at(t)
    if z == MASK:
        return at.mask_weight
    return at.right_weight if z == x0 else at.wrong_weight


def term(noise, t: float, x0: int, z: int, x_hat_V: np.ndarray) -> float:
    """The bound's integrand at one position, by the direct sums over the vocabulary and M."""
    q_V = full_q(noise, t)[x0]
    q_hat_V = x_hat_V @ full_q(noise, t)
    kept = q_V > 0
    divergence = float(np.sum(q_V[kept] * np.log(q_V[kept] / q_hat_V[kept])))
    ratio = q_V[z] / q_hat_V[z]
    return weight(noise, t, x0, z) * (divergence + ratio - 1 - np.log(ratio))


def integrate(function, nodes: int = 100) -> float:
    """Integral over t in (0, 1), whose ends may be singular: t = 1 / (1 + exp(-pi sinh s))."""
    grid, total = np.linspace(-3.3, 3.3, nodes + 1), 0.0
    for s in grid:
        t = 1 / (1 + np.exp(-np.pi * np.sinh(s)))
        if 0 < t < 1:
            total += function(t) * np.pi * np.cosh(s) * t * (1 - t)
    return total * (grid[1] - grid[0])


def exact_x_hat(noise, t: float, z: tuple[int, int], place: int) -> np.ndarray:
    """p(x_place | z without z_place) under the toy joint."""
    seen = full_q(noise, t)[:, z[1 - place]]
    posterior_V = (JOINT if place == 0 else JOINT.T) @ seen
    return posterior_V / posterior_V.sum()


def posterior(noise, t: float, z: tuple[int, int], place: int) -> np.ndarray:
    """p(x_place | z), which plain cross-entropy learns."""
    found_V = exact_x_hat(noise, t, z, place) * full_q(noise, t)[:, z[place]]
    return found_V / found_V.sum()


def bound(noise, x0: tuple[int, int], predictor) -> list[float]:
    """The bound on -log p(x0), by token; predictor(noise, t, z, place) gives x_hat."""

    def integrand(place: int):
        def at_time(t: float) -> float:
            q = full_q(noise, t)
            return sum(
                q[x0[0], z[0]]
                * q[x0[1], z[1]]
                * term(noise, t, x0[place], z[place], predictor(noise, t, z, place))
                for z in itertools.product(range(N + 1), repeat=2)
                if q[x0[0], z[0]] * q[x0[1], z[1]] > 0
            )

        return at_time

    return [integrate(integrand(place)) for place in (0, 1)]
