"""Held-out loss of exported models on shard sets, matched token for token.

Of every window the first token is given and all others are scored, by masked diffusion as by an
autoregressive model: the same tokens, with the same context. All models get the same windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.corpus.tokenizer import load_tokenizer
from megatron_mdm.data.manifest import check_manifest, manifest_path
from megatron_mdm.data.order import Permutation
from megatron_mdm.data.views import open_tokens
from megatron_mdm.data.windows import SourceWindows
from megatron_mdm.diffusion.intervals import student_reach
from megatron_mdm.diffusion.likelihood import (
    Estimate,
    degrees_of_mean,
    mean_with_standard_error,
)
from megatron_mdm.errors import ConfigError
from megatron_mdm.evaluation.requests import Score, ScoringRequest
from megatron_mdm.generation.text_model import ModelFacts

# Keeps the choice of windows apart from that of validation.
_CHOICE_DOMAIN = 0xE7A1

ScoreRequests = Callable[[Sequence[ScoringRequest]], list[Score]]


class Domain(NamedTuple):
    """A shard set to be judged on: a domain, or a slice of time.

    Attributes:
        name: What to call it.
        prefix: Path of its shards without extension.
    """

    name: str
    prefix: Path


class DomainLoss(NamedTuple):
    """What a model's held-out loss on a domain is.

    Attributes:
        domain: Its name.
        losses_N: Nats per token of each window, float64 [N].
        estimate: Their mean, with a standard error over windows and noise.
        num_tokens: Scored tokens.
    """

    domain: str
    losses_N: NDArray[np.float64]
    estimate: Estimate
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """Exp of the loss; of masked diffusion an upper bound."""
        return math.exp(self.estimate.mean)

    @property
    def perplexity_interval(self) -> tuple[float, float]:
        """Where the perplexity lies, with 95%, by Student's t over windows."""
        degrees = degrees_of_mean(len(self.losses_N))
        reach = student_reach(self.estimate.standard_error, degrees)
        return math.exp(self.estimate.mean - reach), math.exp(self.estimate.mean + reach)


def parse_domain(text: str) -> Domain:
    """Reads NAME=PREFIX, or PREFIX, whose last part is then the name.

    Args:
        text: From the command line.

    Returns:
        The domain.
    """
    name, mark, prefix = text.partition("=")
    path = Path(prefix if mark else text)
    return Domain(name if mark else path.name, path)


def open_domain(
    domain: Domain, facts: ModelFacts, seq_length: int, tokenizer: Path
) -> SourceWindows:
    """Opens the windows of a domain.

    Args:
        domain: Which.
        facts: Of the model that will be judged.
        seq_length: Tokens a window, S.
        tokenizer: Folder of the model's tokenizer, for shards that name theirs.

    Returns:
        The windows.

    Raises:
        ConfigError: The windows are longer than the model takes, or hold nothing to score.
        DataError: The shards are missing, damaged, too few or of another tokenizer.
    """
    if not 2 <= seq_length <= facts.max_length:
        raise ConfigError(
            f"--seq-length={seq_length} does not fit {facts.name}, which takes 2 to "
            f"{facts.max_length} tokens: give a length in that range for all models."
        )
    shards = open_tokens(domain.prefix)
    if shards.manifest is not None:
        check_manifest(
            shards.manifest,
            path=manifest_path(shards.prefix),
            vocab_size=facts.vocab_size,
            tokenizer_sha256=load_tokenizer(str(tokenizer)).sha256,
            export=tokenizer,
        )
    return SourceWindows(shards, seq_length, facts.vocab_size)


def choose_windows(windows: SourceWindows, number: int, seed: int) -> list[ScoringRequest]:
    """Chooses windows from all over a domain.

    Args:
        windows: Of the domain.
        number: How many, at most.
        seed: Of the choice.

    Returns:
        Requests: the first token is given, the others are scored.
    """
    count = min(number, windows.num_windows)
    chosen = Permutation(windows.num_windows, (seed, _CHOICE_DOMAIN))(np.arange(count))
    read = (windows.read(int(window)).tolist() for window in chosen)
    return [ScoringRequest((tokens[0],), tuple(tokens[1:])) for tokens in read]


def domain_loss(
    domain: str, requests: Sequence[ScoringRequest], score: ScoreRequests
) -> DomainLoss:
    """Judges a model on windows.

    Args:
        domain: Name of the domain.
        requests: Of `choose_windows`.
        score: Scores with the model.

    Returns:
        The loss.
    """
    sizes_N = np.array([len(request.continuation) for request in requests])
    losses_N = -np.array([found.log_likelihood for found in score(requests)]) / sizes_N
    return DomainLoss(domain, losses_N, mean_with_standard_error(losses_N), int(sizes_N.sum()))


def paired_difference(first: DomainLoss, second: DomainLoss) -> Estimate:
    """How much higher the second model's loss is, window by window.

    Args:
        first: Of one model.
        second: Of another one, on the same windows.

    Returns:
        Mean difference in nats per token; what the windows have in common is not in its error.
    """
    return mean_with_standard_error(second.losses_N - first.losses_N)
