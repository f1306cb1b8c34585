"""Requests to a model, settings of scoring, and scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.core.statistics import student_reach
from megatron_mdm.diffusion.probes import EstimatorKind
from megatron_mdm.inference.models import ModelFacts

GreedyMatch = Literal["confidence", "left_to_right", "none"]


class Request(NamedTuple):
    """A request: tokens that are given, and tokens that are asked for.

    Attributes:
        context: Token ids that are given; may be empty for masked diffusion.
        continuation: Token ids whose log-probability is wanted; mask tokens where new ones are.
        suffix: Token ids that are given after them.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    suffix: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of all parts."""
        return len(self.context) + len(self.continuation) + len(self.suffix)


def check_request(request: Request, facts: ModelFacts, name: str) -> None:
    """Refuses a request that a model cannot answer.

    Args:
        request: What is asked.
        facts: Of the model.
        name: What to call the request.

    Raises:
        DataError: Nothing is asked for; the whole does not fit the model's length; a token is none
            of the vocabulary; or there is no context, and the model predicts a token from the one
            before it.
    """
    asked = len(request.continuation)
    if asked == 0:
        raise DataError(f"{name} has an empty continuation: there is nothing to score.")
    if (facts.is_causal or facts.is_shifted) and not request.context:
        why = "is autoregressive" if facts.is_causal else "predicts each token from the one before"
        raise DataError(
            f"{name} has no context, but {facts.name} {why} and needs a token to start from: give "
            "a text, or begin with the end-of-text token."
        )
    if request.length > facts.max_length:
        raise DataError(
            f"{name} has {request.length:,} tokens, {asked:,} of them asked for and "
            f"{len(request.suffix):,} of a suffix, and {facts.name} was trained on at most "
            f"{facts.max_length:,}: shorten the text, lower --length, or score long texts in "
            "rolling windows."
        )
    is_generated = request.continuation == (facts.mask_token_id,) * asked
    known = () if is_generated else request.continuation
    for token in (*request.context, *known, *request.suffix):
        if not 0 <= token < facts.vocab_size or token == facts.mask_token_id:
            raise DataError(
                f"{name} holds token {token}, which is none of the {facts.vocab_size:,} that "
                f"{facts.name} can predict: use the tokenizer of the model."
            )


@dataclass(frozen=True)
class ScoringSettings:
    """How masked diffusion is scored; of an autoregressive model only `max_tokens` matters.

    Attributes:
        estimator: Random masks of exactly l tokens (fixed_count), or of each with probability p
            (monte_carlo); left to right (chain_rule); or the noise that the model was trained
            with, where that is hybrid or uniform (process). None: process there, else fixed_count.
            See `megatron_mdm.diffusion.probes`.
        draws: Random masks per round.
        stratified: Spread t over the draws; False: independent t.
        target_standard_error: Draw again, as many each time, until the error of every request is
            no more, in nats; None: one round.
        max_draws: Most random masks for one request.
        guidance_scale: Weight w of classifier-free guidance against the masked context; 0: none.
        greedy_match: Order in which `is_greedy` unmasks the continuation: the likeliest token
            first, from left to right, or not at all.
        seed: Of the masks.
        max_tokens: Most tokens of a forward pass, padding and both passes of guidance included;
            None: what suits the device.
    """

    estimator: EstimatorKind | None = None
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

    def choose_estimator(self, facts: ModelFacts) -> EstimatorKind:
        """The estimator that is asked for, or else that of a model's own bound."""
        return self.estimator or ("fixed_count" if facts.noise is None else "process")


class Score(NamedTuple):
    """The score of a continuation.

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
