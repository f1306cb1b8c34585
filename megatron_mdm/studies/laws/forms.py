"""Loss as a function of parameters, tokens and unique tokens: the forms that can be fitted.

Symbols: N parameters, counted as they were in the runs that the constants were fitted to, which
`storage.LawFile` says; D training tokens, U unique tokens of them, E the irreducible loss. Losses
are nats per token. R runs, K constants of a form.

Every form is L = E + A / N'^alpha + B / D'^beta; they differ in N' and D', what repetition is
worth.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

# Of the logarithm of epochs, and of parameters over useful ones: beyond it nothing changes.
_LARGEST_LOG_RATIO = 80.0


@dataclass(frozen=True)
class Law(ABC):
    """What all forms share. The fields of a form are its constants, all positive.

    Attributes:
        parameter_scale: A.
        token_scale: B.
        irreducible_loss: E, nats per token.
        parameter_exponent: alpha.
        token_exponent: beta.
    """

    form: ClassVar[str]
    # Constants that say what repetition is worth; the others are those of Chinchilla's law.
    reuse_names: ClassVar[tuple[str, ...]] = ()
    # Constants that lie between 0 and 1; the others have no upper limit.
    fraction_names: ClassVar[frozenset[str]] = frozenset()

    parameter_scale: float
    token_scale: float
    irreducible_loss: float
    parameter_exponent: float
    token_exponent: float

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the constants, in the order in which `log_loss` takes them."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Law:
        """Makes a law of K numbers in the order of `names`."""
        return cls(*map(float, values))

    def values(self) -> list[float]:
        """The constants, in the order of `names`."""
        return [float(getattr(self, name)) for name in self.names()]

    def loss(self, *, num_parameters: Tensor, num_tokens: Tensor, unique_tokens: Tensor) -> Tensor:
        """Expected loss of runs.

        Args:
            num_parameters: float64, N.
            num_tokens: float64, D.
            unique_tokens: float64, U; more than D counts as D. The three broadcast.

        Returns:
            float64, nats per token.
        """
        constants_K = torch.tensor(self.values(), dtype=torch.float64)
        return self.log_loss(constants_K, num_parameters, num_tokens, unique_tokens).exp()

    def effective_epochs(self, epochs: Tensor) -> Tensor:
        """D' / U, what epochs over the same tokens are worth.

        Args:
            epochs: float64 [E], D / U, at least 1.

        Returns:
            float64 [E], in epochs over new tokens.
        """
        reuse = [getattr(self, name) for name in self.reuse_names[:1]]
        constant = torch.tensor(reuse[0] if reuse else 0.0, dtype=torch.float64)
        return self._log_worth(epochs.log(), constant).exp()

    @classmethod
    def log_loss(
        cls, constants: Tensor, num_parameters: Tensor, num_tokens: Tensor, unique_tokens: Tensor
    ) -> Tensor:
        """Logarithm of the expected loss, differentiable, for one law or many at once.

        Args:
            constants: float64 [..., K], in the order of `names`; what stands before K broadcasts
                against the runs: [K] for one law, [laws, 1, K] for several.
            num_parameters: float64 [R], N.
            num_tokens: float64 [R], D.
            unique_tokens: float64 [R], U; more than D counts as D.

        Returns:
            float64 [..., R].
        """
        a, b, e, alpha, beta, *reuse = constants.unbind(-1)
        log_a, log_b = a.log(), b.log()
        log_n, log_d = num_parameters.log(), num_tokens.log()
        if reuse:
            log_u = torch.minimum(unique_tokens, num_tokens).log()
            # Logarithms throughout: far from the best fit these powers leave the range of floats.
            log_g = (alpha.log() + log_a - beta.log() - log_b) / (alpha + beta)
            log_useful = torch.minimum(log_n, log_g + beta / alpha * (log_u + log_g))
            token_reuse, parameter_reuse = reuse
            log_d = log_u + cls._log_worth(log_d - log_u, token_reuse)
            log_n = log_useful + cls._log_worth(log_n - log_useful, parameter_reuse)
        terms = torch.broadcast_tensors(log_a - alpha * log_n, log_b - beta * log_d, e.log())
        return torch.logsumexp(torch.stack(terms), dim=0)

    @classmethod
    @abstractmethod
    def _log_worth(cls, log_epochs: Tensor, reuse: Tensor) -> Tensor:
        """What epochs over the same data are worth, in epochs over new data, both as logarithms."""


@dataclass(frozen=True)
class ChinchillaLaw(Law):
    """L = E + A / N^alpha + B / D^beta: repeated tokens count as new ones.

    Source:
        arXiv 2203.15556, section 3.3.
    """

    form = "chinchilla"

    @classmethod
    def _log_worth(cls, log_epochs: Tensor, reuse: Tensor) -> Tensor:
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

    token_reuse: float = float("inf")
    parameter_reuse: float = float("inf")

    @classmethod
    def _log_worth(cls, log_epochs: Tensor, reuse: Tensor) -> Tensor:
        repeats = torch.expm1(log_epochs.clamp(max=_LARGEST_LOG_RATIO))
        ratio = repeats / reuse
        # Where no branch is taken its gradient must still be a number.
        safe = torch.where(ratio > 0, ratio, 1.0)
        share = torch.where(ratio > 0, -torch.expm1(-safe) / safe, 1.0)
        return torch.log1p(repeats * share)


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
    fraction_names = frozenset(reuse_names)

    token_decay: float = 0.0
    parameter_decay: float = 0.0

    @classmethod
    def _log_worth(cls, log_epochs: Tensor, reuse: Tensor) -> Tensor:
        epochs = log_epochs.clamp(max=_LARGEST_LOG_RATIO).exp()
        safe = torch.where(reuse > 0, reuse, 0.5)
        worth = -torch.expm1(epochs * torch.log1p(-safe)) / safe
        return torch.where(reuse > 0, worth, epochs).log()


FORMS: dict[str, type[Law]] = {
    law.form: law for law in (ChinchillaLaw, DataConstrainedLaw, GeometricLaw)
}
