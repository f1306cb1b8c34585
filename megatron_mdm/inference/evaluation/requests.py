"""What is scored, how, and what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.core.statistics import student_reach
from megatron_mdm.diffusion.probes import EstimatorKind
from megatron_mdm.inference.generation.text_model import ModelFacts

GreedyMatch = Literal["confidence", "left_to_right", "none"]


class ScoringRequest(NamedTuple):
    """A continuation to score.

    Attributes:
        context: Token ids that are given; may be empty for masked diffusion.
        continuation: Token ids whose log-probability is wanted.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.context) + len(self.continuation)


class Question(NamedTuple):
    """Forward passes over one request.

    Attributes:
        request: What is scored.
        hidden_KL: Bool [K, L], tokens of the continuation that are masked in each pass.
        asked_KL: Bool [K, L], those whose log-probabilities are wanted. What is hidden decides it.
    """

    request: ScoringRequest
    hidden_KL: NDArray[np.bool_]
    asked_KL: NDArray[np.bool_]


class Reply(NamedTuple):
    """What the model says to a question; where nothing was asked, 0 and True.

    Attributes:
        log_probs_KL: float64 [K, L], nats.
        confidences_KL: float64 [K, L], log-probability of the likeliest token there.
        is_best_KL: Bool [K, L], is the true token that one?
    """

    log_probs_KL: NDArray[np.float64]
    confidences_KL: NDArray[np.float64]
    is_best_KL: NDArray[np.bool_]


class Score(NamedTuple):
    """What is known of a continuation.

    Attributes:
        log_likelihood: log p(continuation | context), nats; the estimate of a lower bound where
            the estimator is one of the bound.
        standard_error: Of the estimate; 0 where there is no noise.
        is_greedy: Would the model have written it, always taking the likeliest token? None if it
            was not asked.
        num_passes: Forward passes that the estimate has, guidance counted twice; equal ones are
            made once.
        degrees_of_freedom: Of the standard error; infinite where there is no noise.
    """

    log_likelihood: float
    standard_error: float
    is_greedy: bool | None
    num_passes: int
    degrees_of_freedom: float = math.inf

    @property
    def reach(self) -> float:
        """Half the width of the 95% interval around the log-likelihood, Student's; nats."""
        return student_reach(self.standard_error, self.degrees_of_freedom)


@dataclass(frozen=True)
class ScoringSettings:
    """How masked diffusion is scored; of an autoregressive model only `max_tokens` matters.

    Attributes:
        estimator: See `megatron_mdm.diffusion.probes`.
        draws: Random masks a round.
        stratified: Spread t over the draws; False: independent t.
        target_standard_error: Rounds go on until it is reached, nats; None: one round.
        max_draws: Most random masks for one request.
        guidance_scale: w of classifier-free guidance, with the context masked in the other pass;
            0: none.
        greedy_match: Order in which `is_greedy` reveals the continuation: the likeliest token
            first, from left to right, or not at all.
        seed: Of the masks.
        max_tokens: Most tokens of a forward pass, padding and both passes of guidance included;
            None: what suits the device.
    """

    estimator: EstimatorKind = "fixed_count"
    draws: int = 128
    stratified: bool = True
    target_standard_error: float | None = None
    max_draws: int = 4096
    guidance_scale: float = 0.0
    greedy_match: GreedyMatch = "none"
    seed: int = 0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("draws", 2), ("max_tokens", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is too small: give at least {least}."
                )
        if self.max_draws < self.draws:
            raise ConfigError(
                f"max_draws={self.max_draws} is less than the draws={self.draws} of one round: "
                "raise it or lower draws."
            )
        if self.target_standard_error is not None and not self.target_standard_error > 0:
            raise ConfigError(
                f"target_standard_error={self.target_standard_error} is not above 0: no number of "
                "draws reaches it."
            )


def check_request(request: ScoringRequest, facts: ModelFacts, name: str) -> None:
    """Refuses what cannot be scored.

    Args:
        request: Context and continuation.
        facts: Of the model.
        name: What to call the request.

    Raises:
        DataError: The continuation is empty, does not fit the model's length with its context, or
            a token is none of the vocabulary; or a causal model has no context.
    """
    if not request.continuation:
        raise DataError(f"{name} has an empty continuation: there is nothing to score.")
    if facts.is_causal and not request.context:
        raise DataError(
            f"{name} has no context, and an autoregressive model predicts nothing without: begin "
            "with the end-of-text token."
        )
    if request.length > facts.max_length:
        raise DataError(
            f"{name} has {request.length:,} tokens, {len(request.continuation):,} of them to be "
            f"scored, and {facts.name} was trained on at most {facts.max_length:,}: shorten the "
            "context, or score long texts in rolling windows."
        )
    for token in (*request.context, *request.continuation):
        if not 0 <= token < facts.vocab_size or token == facts.mask_token_id:
            raise DataError(
                f"{name} holds token {token}, which is none of the {facts.vocab_size:,} that "
                f"{facts.name} can predict: use the tokenizer of the model."
            )
