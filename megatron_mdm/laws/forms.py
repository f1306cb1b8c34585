"""Loss as a function of parameters, tokens and unique tokens.

Symbols: N parameters without embeddings, D training tokens, U unique tokens of them, E the
irreducible loss. Losses are nats per token. R runs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class DataConstrainedLaw:
    """L = E + A / N'^alpha + B / D'^beta, where repetition wears out.

    D' = U + U R_D (1 - exp(-(D / U - 1) / R_D)), and N' likewise from the parameters N and the most
    that U tokens can use, U_N = min(N, N*(U)), with N*(D) = G (D G)^(beta / alpha) and
    G = (alpha A / (beta B))^(1 / (alpha + beta)), the optimum without repetition. With infinite R_D
    and R_N it is the law of Chinchilla, N' = N and D' = D.

    Attributes:
        parameter_scale: A.
        token_scale: B.
        irreducible_loss: E, nats per token.
        parameter_exponent: alpha.
        token_exponent: beta.
        token_reuse: R_D, repetitions after which further ones are worth 1 / e of a new pass.
        parameter_reuse: R_N, the same of parameters beyond U_N.

    Source:
        arXiv 2305.16264, section 3; arXiv 2203.15556, section 3.3.
    """

    parameter_scale: float
    token_scale: float
    irreducible_loss: float
    parameter_exponent: float
    token_exponent: float
    token_reuse: float = float("inf")
    parameter_reuse: float = float("inf")

    def loss(self, *, num_parameters: Tensor, num_tokens: Tensor, unique_tokens: Tensor) -> Tensor:
        """Expected loss of runs.

        Args:
            num_parameters: float64 [R], N.
            num_tokens: float64 [R], D.
            unique_tokens: float64 [R], U; more than D counts as D.

        Returns:
            float64 [R], nats per token.
        """
        constants = torch.tensor(
            [getattr(self, field.name) for field in fields(self)], dtype=torch.float64
        )
        return log_loss(constants, num_parameters, num_tokens, unique_tokens).exp()


def log_loss(
    constants_7: Tensor, num_parameters: Tensor, num_tokens: Tensor, unique_tokens: Tensor
) -> Tensor:
    """Logarithm of the expected loss, differentiable.

    Args:
        constants_7: float64 [7], in the order of the fields of `DataConstrainedLaw`.
        num_parameters: float64 [R], N.
        num_tokens: float64 [R], D.
        unique_tokens: float64 [R], U; more than D counts as D.

    Returns:
        float64 [R].
    """
    a, b, e, alpha, beta, token_reuse, parameter_reuse = constants_7
    unique_tokens = torch.minimum(unique_tokens, num_tokens)
    g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    useful_parameters = torch.minimum(num_parameters, g * (unique_tokens * g) ** (beta / alpha))
    parameters = effective(num_parameters, useful_parameters, parameter_reuse)
    tokens = effective(num_tokens, unique_tokens, token_reuse)
    terms = (a.log() - alpha * parameters.log(), b.log() - beta * tokens.log(), e.log())
    return torch.logsumexp(torch.stack(torch.broadcast_tensors(*terms)), dim=0)


def effective(amount: Tensor, unique: Tensor, reuse: Tensor) -> Tensor:
    """What an amount with repetition is worth without: U + U R (1 - exp(-(amount / U - 1) / R)).

    Args:
        amount: float64 [R], at least `unique`.
        unique: float64 [R], U.
        reuse: float64 scalar, R; infinite: repetition is worth as much as what is new.

    Returns:
        float64 [R].
    """
    if torch.isinf(reuse):
        return amount
    return unique - unique * reuse * torch.expm1((1 - amount / unique) / reuse)
