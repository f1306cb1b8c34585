"""Forms whose loss has a minimum in the number of epochs: beyond it more of them overfit.

E stands for epochs, D / U, here; the irreducible loss is a constant that has no part in this.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from megatron_mdm.studies.laws.forms import (
    Array,
    ChinchillaLaw,
    DataConstrainedLaw,
    Law,
    constant,
)

# Where the minimum is looked for, in logarithms of epochs, by halving: to about 1e-12.
_MOST_LOG_EPOCHS = 60.0
_HALVINGS = 46
# With a penalty there is more to begin with, so reuses begin at fewer places.
_FEW_REUSES = (6.0, 60.0)


class Minimum(NamedTuple):
    """Where a law shall have its minimum in epochs.

    Attributes:
        num_parameters: N.
        unique_tokens: U.
        num_epochs: E* there.
    """

    num_parameters: float
    unique_tokens: float
    num_epochs: float


@dataclass(frozen=True)
class PenalizedLaw(Law):
    """Adds P (N / U)^kappa (E^delta - 1) to the loss of a form, E = D / U epochs.

    Nothing at one epoch; a power law in epochs after many, and in parameters per unique token: the
    additive penalty of arXiv 2605.01640, which found that excess losses under repetition follow
    powers of both. There the power is of repetitions, E - 1; E^delta - 1 has the same limit, is
    smooth at E = 1 for every delta, and gives the minimum below in closed form. With P = 0 it is
    the form to which it was added.

    The minimum. Let e(E) be what E epochs are worth, B U^-beta e^-beta the term of the tokens and
    h(E) = -d log(-dT / d log E) / d log E, T that term. Where dL / d log E = 0,

        delta P (N / U)^kappa E^delta = beta B U^-beta e^-beta (d log e / d log E).

    The right side falls in E and the left one grows, so there is one minimum at most; below E = 1
    it counts as 1. Moving U and N along with it gives the exponents of E* ~ U^a / N^b,

        a = (kappa - beta) / (delta + h),  b = kappa / (delta + h),

    with h = beta where repetition wears out by the penalty alone. For the published 0.39 and 0.55
    (arXiv 2510.03280) and beta = 0.3 that is kappa = 1.0 and delta = 1.6: one exponent for N / U
    is enough, and a second one for U could not be told from beta by a few dozen runs.

    Attributes:
        overfitting_scale: P, nats per token.
        capacity_exponent: kappa, of parameters per unique token.
        overfitting_exponent: delta, of epochs.

    Source:
        arXiv 2605.01640 (the penalty); that it takes E - 1 and N / U as powers is read in summaries
        of it, its fitted exponents are not known here. arXiv 2510.03280 has U-shaped losses too,
        by a D' that falls again; its coefficients are not known here either.
    """

    penalty_names = ("overfitting_scale", "capacity_exponent", "overfitting_exponent")

    overfitting_scale: float = constant("P", 1e-12, 1e6, default=0.0)
    capacity_exponent: float = constant("kappa", 1e-3, 10.0, starts=(0.4, 1.2), default=1.0)
    overfitting_exponent: float = constant("delta", 1e-3, 10.0, starts=(0.6, 1.8), default=1.0)

    @classmethod
    def log_middles(
        cls, log_parameters: float, log_tokens: float, log_unique_tokens: float
    ) -> Mapping[str, Mapping[str, float]]:
        """As for every law; of the penalty, at the epochs there, without the - 1."""
        others = super().log_middles(log_parameters, log_tokens, log_unique_tokens)
        of_penalty = {
            "capacity_exponent": log_unique_tokens - log_parameters,
            "overfitting_exponent": min(log_unique_tokens - log_tokens, 0.0),
        }
        return {**others, "overfitting_scale": of_penalty}

    @classmethod
    def log_best_epochs(
        cls, constants: Array, num_parameters: ArrayLike, unique_tokens: ArrayLike
    ) -> Array:
        """As for every law; infinite beyond e^60 epochs."""
        named = dict(zip(cls.names(), np.moveaxis(constants, -1, 0), strict=True))
        log_n, log_u = np.log(num_parameters), np.log(unique_tokens)
        shape = np.broadcast_shapes(constants.shape[:-1], log_n.shape, log_u.shape)
        low, high = np.zeros(shape), np.full(shape, _MOST_LOG_EPOCHS)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            with np.errstate(all="ignore"):
                rises = cls._log_rise(named, log_n, log_u, middle) > cls._log_fall(
                    named, log_u, middle
                )
            low, high = np.where(rises, low, middle), np.where(rises, middle, high)
        found = np.where(high < _MOST_LOG_EPOCHS, (low + high) / 2, np.inf)
        # Where the first epoch is the best, no halving has moved the low end.
        return np.asarray(np.where(low > 0, found, 0.0))

    @classmethod
    def log_scale_at(cls, named: Mapping[str, Array], minimum: Minimum) -> Array:
        """Logarithm of the P that puts the minimum in its place.

        Args:
            named: The other constants, [...] each, by name.
            minimum: Where it shall be.

        Returns:
            float64 [...].
        """
        log_n, log_u, log_epochs = np.log(minimum)
        unit = {**named, "overfitting_scale": np.asarray(1.0)}
        return np.asarray(
            cls._log_fall(unit, log_u, log_epochs) - cls._log_rise(unit, log_n, log_u, log_epochs)
        )

    @classmethod
    def best_epochs_exponents(
        cls, constants: Array, num_parameters: ArrayLike, unique_tokens: ArrayLike
    ) -> Array:
        """Exponents of the best number of epochs, E* ~ U^a / N^b near some N and U.

        Args:
            constants: float64 [..., K], as for `log_loss`.
            num_parameters: N.
            unique_tokens: U.

        Returns:
            float64 [..., 2], a and b; nan where there is no minimum.
        """
        named = dict(zip(cls.names(), np.moveaxis(constants, -1, 0), strict=True))
        log_epochs = cls.log_best_epochs(constants, num_parameters, unique_tokens)
        kappa = named["capacity_exponent"]
        with np.errstate(all="ignore"):
            slope = cls._fall_slope(named, log_epochs)
            steepness = named["overfitting_exponent"] + slope
            exponents = np.stack([kappa - named["token_exponent"], kappa + 0 * slope], axis=-1)
            found = exponents / steepness[..., None]
        return np.asarray(np.where(np.isfinite(log_epochs)[..., None], found, np.nan))

    @classmethod
    def _log_penalty(
        cls, named: Mapping[str, Array], log_parameters: Array, log_unique: Array, log_epochs: Array
    ) -> Array:
        power = named["overfitting_exponent"] * log_epochs
        # log(expm1(power)), also where that leaves the range of floats; -inf at one epoch.
        with np.errstate(divide="ignore"):
            log_excess = power + np.log(-np.expm1(-power))
            log_scale = np.log(named["overfitting_scale"])
        ratio = log_parameters - log_unique
        return np.asarray(log_scale + named["capacity_exponent"] * ratio + log_excess)

    @classmethod
    def _log_rise(
        cls, named: Mapping[str, Array], log_n: Array, log_u: Array, log_epochs: Array
    ) -> Array:
        """Logarithm of dL / d log E of the penalty."""
        delta = named["overfitting_exponent"]
        scale = np.log(delta) + np.log(named["overfitting_scale"])
        ratio = named["capacity_exponent"] * (log_n - log_u)
        return np.asarray(scale + ratio + delta * log_epochs)

    @classmethod
    def _log_fall(cls, named: Mapping[str, Array], log_u: Array, log_epochs: Array) -> Array:
        """Logarithm of -dL / d log E of the term of the tokens."""
        beta = named["token_exponent"]
        log_worth, log_share = cls._worth_of_epochs(named, log_epochs)
        term = np.log(named["token_scale"]) - beta * (log_u + log_worth)
        return np.asarray(np.log(beta) + term + log_share)

    @classmethod
    @abstractmethod
    def _worth_of_epochs(cls, named: Mapping[str, Array], log_epochs: Array) -> tuple[Array, Array]:
        """Logarithms of e, what epochs are worth, and of d log e / d log E."""

    @classmethod
    @abstractmethod
    def _fall_slope(cls, named: Mapping[str, Array], log_epochs: Array) -> Array:
        """h, how fast what a further epoch gains falls: -d `_log_fall` / d log E."""


@dataclass(frozen=True)
class OverfittingLaw(PenalizedLaw, ChinchillaLaw):
    """L = E + A / N^alpha + B / D^beta + P (N / U)^kappa ((D / U)^delta - 1).

    Repeated tokens count as new ones, and cost what `PenalizedLaw` says. Best epochs are an exact
    power law, E* = (beta B / (delta P))^(1 / (delta + beta)) U^a / N^b with
    a = (kappa - beta) / (delta + beta) and b = kappa / (delta + beta), where that is above 1.
    With P = 0 it is the law of Chinchilla.
    """

    form = "overfitting"

    @classmethod
    def log_best_epochs(
        cls, constants: Array, num_parameters: ArrayLike, unique_tokens: ArrayLike
    ) -> Array:
        """As for every law, in closed form."""
        named = dict(zip(cls.names(), np.moveaxis(constants, -1, 0), strict=True))
        log_n, log_u = np.log(num_parameters), np.log(unique_tokens)
        start = np.asarray(0.0)
        with np.errstate(all="ignore"):
            gap = cls._log_fall(named, log_u, start) - cls._log_rise(named, log_n, log_u, start)
            found = gap / (named["overfitting_exponent"] + named["token_exponent"])
        return np.asarray(np.maximum(found, 0.0))

    @classmethod
    def _worth_of_epochs(cls, named: Mapping[str, Array], log_epochs: Array) -> tuple[Array, Array]:
        return log_epochs, np.zeros_like(log_epochs)

    @classmethod
    def _fall_slope(cls, named: Mapping[str, Array], log_epochs: Array) -> Array:
        return np.asarray(named["token_exponent"] + np.zeros_like(log_epochs))


@dataclass(frozen=True)
class DataConstrainedOverfittingLaw(PenalizedLaw, DataConstrainedLaw):
    """`DataConstrainedLaw` with the penalty of `PenalizedLaw`: repetition wears out, and overfits.

    N' and D' are those of the former, so that with P = 0 it is the former, and with infinite R_D
    and R_N it is `OverfittingLaw`. Two constants more than that one has: runs on both sides of the
    minimum, at several U and N, have to tell R_D and delta apart; `--hold parameter_reuse=inf`
    takes one away.

    With x = exp(-(E - 1) / R_D) and e = 1 + R_D (1 - x), d log e / d log E = E x / e and
    h = E / R_D + (beta + 1) E x / e - 1, which is above 0 for every E.
    """

    form = "data_constrained_overfitting"

    token_reuse: float = constant("R_D", 1e-3, 1e6, starts=_FEW_REUSES, default=float("inf"))
    parameter_reuse: float = constant("R_N", 1e-3, 1e6, starts=_FEW_REUSES, default=float("inf"))

    @classmethod
    def _worth_of_epochs(cls, named: Mapping[str, Array], log_epochs: Array) -> tuple[Array, Array]:
        reuse = named["token_reuse"]
        log_worth = cls._log_worth(log_epochs, reuse)
        return log_worth, log_epochs - np.expm1(log_epochs) / reuse - log_worth

    @classmethod
    def _fall_slope(cls, named: Mapping[str, Array], log_epochs: Array) -> Array:
        _, log_share = cls._worth_of_epochs(named, log_epochs)
        worn = np.exp(log_epochs) / named["token_reuse"]
        return np.asarray(worn + (named["token_exponent"] + 1) * np.exp(log_share) - 1)
