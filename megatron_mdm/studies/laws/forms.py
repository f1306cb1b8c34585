"""Loss as a function of parameters, tokens and unique tokens: the forms that can be fitted.

Symbols: N parameters, counted as they were in the runs that the constants were fitted to, which
`storage.LawFile` says; D training tokens, U unique tokens of them, E the irreducible loss. Losses
are nats per token. R runs, K constants of a form.

Every form is L = E + A / N'^alpha + B / D'^beta, to which a form may add what overfitting costs;
they differ in N' and D', what repetition is worth. A form is a class: its fields are its constants,
each with what fits and plots must know. One from outside the package is named
`package.module:Class`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit

from megatron_mdm.core.registry import Registry

Array = NDArray[np.float64]
# Of the logarithm of epochs, and of parameters over useful ones: beyond it nothing changes.
_LARGEST_LOG_RATIO = 80.0
# An infinite reuse has a coordinate too.
_TINY, _HUGE = 1e-300, 1e300
_REUSES = (2.0, 6.0, 20.0, 60.0, 180.0)
# Starts are 1 / (1 + R) for those of R above.
_DECAY: Any = {
    "starts": tuple(1 / (1 + one) for one in _REUSES),
    "is_fraction": True,
    "default": 0.0,
}


@dataclass(frozen=True)
class Constant:
    """What fits and plots must know of a constant.

    Attributes:
        symbol: In formulas.
        low: Where the search ends; of a scale, that of its term's size in the middle of the runs.
            A fit that arrives there has not found the constant.
        high: The other end.
        starts: Where fits begin; empty where that follows from the runs.
        is_fraction: Whether it lies between 0 and 1; others have no upper limit.
        default: The value of a law that does not name it, allowed even where it is 0 or infinite;
            None: every law names it.
    """

    symbol: str
    low: float
    high: float
    starts: tuple[float, ...] = ()
    is_fraction: bool = False
    default: float | None = None

    def may_be(self, value: float) -> bool:
        """Whether a law may have this value."""
        is_inside = 0 < value <= 1 if self.is_fraction else 0 < value < math.inf
        return is_inside or value == self.default

    def coordinate(self, value: ArrayLike) -> Any:
        """A value as a number without limits: its logarithm, or the logit of a fraction."""
        if self.is_fraction:
            return logit(np.clip(value, self.low, self.high))
        return np.log(np.clip(value, _TINY, _HUGE))

    def value(self, coordinate: ArrayLike) -> Any:
        """The value that has a coordinate."""
        return expit(coordinate) if self.is_fraction else np.exp(coordinate)


def constant(
    symbol: str,
    low: float,
    high: float,
    *,
    starts: tuple[float, ...] = (),
    is_fraction: bool = False,
    default: Any = MISSING,
) -> Any:
    """A field of a law: its value by default, and what `Constant` holds of it."""
    named = None if default is MISSING else float(default)
    about = Constant(symbol, low, high, starts, is_fraction, named)
    return field(default=default, metadata={"constant": about})


@dataclass(frozen=True)
class Law(ABC):
    """What all forms share. The fields of a form are its constants; none is negative.

    Attributes:
        parameter_scale: A.
        token_scale: B.
        irreducible_loss: E, nats per token.
        parameter_exponent: alpha.
        token_exponent: beta.
    """

    # Its name in law files; of a form from outside the package its place.
    form: ClassVar[str]
    # Constants that say what repetition is worth, of tokens and of parameters.
    reuse_names: ClassVar[tuple[str, ...]] = ()
    # Constants that say what overfitting costs: its scale, and exponents.
    penalty_names: ClassVar[tuple[str, ...]] = ()

    parameter_scale: float = constant("A", 1e-12, 1e6)
    token_scale: float = constant("B", 1e-12, 1e6)
    irreducible_loss: float = constant("E", 1e-6, 1e3)
    parameter_exponent: float = constant("alpha", 1e-3, 10.0, starts=(0.1, 0.25, 0.45, 0.8))
    token_exponent: float = constant("beta", 1e-3, 10.0, starts=(0.1, 0.25, 0.45, 0.8))

    def __init_subclass__(cls) -> None:
        if "form" not in vars(cls):
            cls.form = f"{cls.__module__}:{cls.__qualname__}"

    @classmethod
    def constants(cls) -> dict[str, Constant]:
        """The constants by name, in the order in which `log_loss` takes them."""
        return {one.name: one.metadata["constant"] for one in fields(cls)}

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the constants, in order."""
        return tuple(cls.constants())

    @classmethod
    def from_values(cls, values: ArrayLike) -> Law:
        """Makes a law of K numbers in the order of `names`."""
        return cls(*np.asarray(values, dtype=np.float64).tolist())

    def values(self) -> list[float]:
        """The constants, in the order of `names`."""
        return [float(getattr(self, name)) for name in self.names()]

    @classmethod
    def minds_repetition(cls) -> bool:
        """Whether a token that was seen before is another thing to it than a new one."""
        return bool(cls.reuse_names or cls.penalty_names)

    @classmethod
    def log_middles(
        cls, log_parameters: float, log_tokens: float, log_unique_tokens: float
    ) -> Mapping[str, Mapping[str, float]]:
        """What tells the size of each scale's term in the middle of some runs.

        Args:
            log_parameters: log N in the middle of them.
            log_tokens: log D.
            log_unique_tokens: log U.

        Returns:
            For the scales, exponents and the number by which each is multiplied: the logarithm of a
            scale is that of its term, plus exponents times their numbers.
        """
        return {
            "parameter_scale": {"parameter_exponent": log_parameters},
            "token_scale": {"token_exponent": log_tokens},
        }

    def loss(
        self, *, num_parameters: ArrayLike, num_tokens: ArrayLike, unique_tokens: ArrayLike
    ) -> Array:
        """Expected loss of runs.

        Args:
            num_parameters: N.
            num_tokens: D.
            unique_tokens: U; more than D counts as D. The three broadcast.

        Returns:
            float64, nats per token.
        """
        return np.exp(
            self.log_loss(np.array(self.values()), num_parameters, num_tokens, unique_tokens)
        )

    def best_epochs(self, *, num_parameters: ArrayLike, unique_tokens: ArrayLike) -> Array:
        """The number of epochs with the least expected loss.

        Args:
            num_parameters: N.
            unique_tokens: U. The two broadcast.

        Returns:
            float64, at least 1; infinite where more epochs never raise the loss.
        """
        constants = np.array(self.values())
        return np.exp(self.log_best_epochs(constants, num_parameters, unique_tokens))

    def effective_epochs(self, epochs: Array) -> Array:
        """D' / U, what epochs over the same tokens are worth.

        Args:
            epochs: float64 [E], D / U, at least 1.

        Returns:
            float64 [E], in epochs over new tokens.
        """
        reuse = getattr(self, self.reuse_names[0]) if self.reuse_names else 0.0
        return np.exp(self._log_worth(np.log(epochs), np.asarray(reuse)))

    @classmethod
    def log_loss(
        cls,
        constants: Array,
        num_parameters: ArrayLike,
        num_tokens: ArrayLike,
        unique_tokens: ArrayLike,
    ) -> Array:
        """Logarithm of the expected loss, for one law or many at once.

        Args:
            constants: float64 [..., K], in the order of `names`; what stands before K broadcasts
                against the runs: [K] for one law, [laws, 1, K] for several.
            num_parameters: [R], N.
            num_tokens: [R], D.
            unique_tokens: [R], U; more than D counts as D.

        Returns:
            float64 [..., R].
        """
        named = dict(zip(cls.names(), np.moveaxis(constants, -1, 0), strict=True))
        alpha, beta = named["parameter_exponent"], named["token_exponent"]
        # A scale of 0 is a term that is not there.
        with np.errstate(divide="ignore"):
            log_a, log_b = np.log(named["parameter_scale"]), np.log(named["token_scale"])
        log_n, log_d = np.log(num_parameters), np.log(num_tokens)
        log_u = np.log(np.minimum(unique_tokens, num_tokens))
        overfitting = cls._log_penalty(named, log_n, log_u, log_d - log_u)
        if cls.reuse_names:
            # Logarithms throughout: far from the best fit these powers leave the range of floats.
            log_g = (np.log(alpha) + log_a - np.log(beta) - log_b) / (alpha + beta)
            log_useful = np.minimum(log_n, log_g + beta / alpha * (log_u + log_g))
            token_reuse, parameter_reuse = (named[name] for name in cls.reuse_names)
            log_d = log_u + cls._log_worth(log_d - log_u, token_reuse)
            log_n = log_useful + cls._log_worth(log_n - log_useful, parameter_reuse)
        reducible = np.logaddexp(log_a - alpha * log_n, log_b - beta * log_d)
        if overfitting is not None:
            reducible = np.logaddexp(reducible, overfitting)
        return np.asarray(np.logaddexp(reducible, np.log(named["irreducible_loss"])))

    @classmethod
    def log_best_epochs(
        cls, constants: Array, num_parameters: ArrayLike, unique_tokens: ArrayLike
    ) -> Array:
        """Logarithm of the number of epochs with the least loss, for one law or many at once.

        Args:
            constants: float64 [..., K], as for `log_loss`.
            num_parameters: [R], N.
            unique_tokens: [R], U.

        Returns:
            float64 [..., R]; infinite where more epochs never raise the loss, as in every form
            without `penalty_names`.
        """
        shape = np.broadcast_shapes(
            constants.shape[:-1], np.shape(num_parameters), np.shape(unique_tokens)
        )
        return np.full(shape, np.inf)

    @classmethod
    def _log_penalty(
        cls, named: Mapping[str, Array], log_parameters: Array, log_unique: Array, log_epochs: Array
    ) -> Array | None:
        """Logarithm of what overfitting adds to the loss; None: nothing."""
        return None

    @classmethod
    @abstractmethod
    def _log_worth(cls, log_epochs: Array, reuse: Array) -> Array:
        """What epochs over the same data are worth, in epochs over new data, both as logarithms."""


@dataclass(frozen=True)
class ChinchillaLaw(Law):
    """L = E + A / N^alpha + B / D^beta: repeated tokens count as new ones.

    Source:
        arXiv 2203.15556, section 3.3.
    """

    form = "chinchilla"

    @classmethod
    def _log_worth(cls, log_epochs: Array, reuse: Array) -> Array:
        return log_epochs


@dataclass(frozen=True)
class DataConstrainedLaw(Law):
    """Repetition wears out: D' = U + U R_D (1 - exp(-(D / U - 1) / R_D)).

    N' likewise from the parameters N and the most that U tokens can use, U_N = min(N, N*(U)), with
    N*(D) = G (D G)^(beta / alpha) and G = (alpha A / (beta B))^(1 / (alpha + beta)), the optimum
    without repetition. With infinite R_D and R_N it is the law of Chinchilla, N' = N and D' = D.

    Attributes:
        token_reuse: R_D, repetitions after which further ones are worth 1 / e of a new pass.
        parameter_reuse: R_N, the same of parameters beyond U_N.

    Source:
        arXiv 2305.16264, section 3 and appendix A.
    """

    form = "data_constrained"
    reuse_names = ("token_reuse", "parameter_reuse")

    token_reuse: float = constant("R_D", 1e-3, 1e6, starts=_REUSES, default=float("inf"))
    parameter_reuse: float = constant("R_N", 1e-3, 1e6, starts=_REUSES, default=float("inf"))

    @classmethod
    def _log_worth(cls, log_epochs: Array, reuse: Array) -> Array:
        repeats = np.expm1(np.minimum(log_epochs, _LARGEST_LOG_RATIO))
        ratio = repeats / reuse
        safe = np.where(ratio > 0, ratio, 1.0)
        return np.log1p(repeats * np.where(ratio > 0, -np.expm1(-safe) / safe, 1.0))


@dataclass(frozen=True)
class GeometricLaw(Law):
    """Pass k over the same data is worth (1 - delta)^(k - 1) of the first.

    D' = U (1 - (1 - delta)^(D / U)) / delta, and N' likewise from N and U_N as in
    `DataConstrainedLaw`, which approximates this form for small delta with R = (1 - delta) / delta.
    With delta 0 it is the law of Chinchilla.

    Attributes:
        token_decay: delta of the tokens, from 0 to 1.
        parameter_decay: delta of the parameters beyond U_N.

    Source:
        arXiv 2305.16264, appendix A, before its approximation.
    """

    form = "geometric"
    reuse_names = ("token_decay", "parameter_decay")

    token_decay: float = constant("delta_D", 1e-6, 1 - 1e-6, **_DECAY)
    parameter_decay: float = constant("delta_N", 1e-6, 1 - 1e-6, **_DECAY)

    @classmethod
    def _log_worth(cls, log_epochs: Array, reuse: Array) -> Array:
        epochs = np.exp(np.minimum(log_epochs, _LARGEST_LOG_RATIO))
        safe = np.where(reuse > 0, reuse, 0.5)
        # With a delta of 1 one pass is all that counts.
        with np.errstate(divide="ignore"):
            worth = -np.expm1(epochs * np.log1p(-safe)) / safe
        return np.log(np.where(reuse > 0, worth, epochs))


_OVERFITTING = "megatron_mdm.studies.laws.overfitting"
_OWN: tuple[type[Law], ...] = (ChinchillaLaw, DataConstrainedLaw, GeometricLaw)
FORMS: Registry[Law] = Registry(
    "a form of scaling law",
    Law,
    {law.form: f"{__name__}:{law.__name__}" for law in _OWN}
    | {
        "overfitting": f"{_OVERFITTING}:OverfittingLaw",
        "data_constrained_overfitting": f"{_OVERFITTING}:DataConstrainedOverfittingLaw",
    },
)


def predicted_losses(
    laws: Sequence[Law],
    num_parameters: ArrayLike,
    num_tokens: ArrayLike,
    unique_tokens: ArrayLike,
) -> Array:
    """Losses that each of several laws of one form expects, such as the resamples of a bootstrap.

    Args:
        laws: At least one.
        num_parameters: [R], N.
        num_tokens: [R], D.
        unique_tokens: [R], U.

    Returns:
        float64 [laws, R], nats per token.
    """
    constants = np.array([law.values() for law in laws])[:, None]
    return np.exp(type(laws[0]).log_loss(constants, num_parameters, num_tokens, unique_tokens))
