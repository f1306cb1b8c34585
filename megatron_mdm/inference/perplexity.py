"""Held-out loss of exported models on shard sets, matched token for token.

Of every window the first token is given and all others are scored, by masked diffusion as by an
autoregressive model: the same tokens, with the same context. All models get the same windows.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.statistics import (
    ClusteredEstimate,
    clustered_mean,
    degrees_of_mean,
    student_reach,
)
from megatron_mdm.corpus.tokenizer import load_tokenizer
from megatron_mdm.data.choice import choose_windows
from megatron_mdm.data.manifest import check_manifest, manifest_path
from megatron_mdm.data.store import open_tokens
from megatron_mdm.data.windows import SourceWindows
from megatron_mdm.inference.models import ModelFacts
from megatron_mdm.inference.requests import Request
from megatron_mdm.inference.scoring import ScoreRequests

# Keeps the choice of windows apart from that of validation.
_CHOICE_DOMAIN = 0xE7A1


class Domain(NamedTuple):
    """A shard set to be judged on: a domain, or a slice of time.

    Attributes:
        name: What to call it.
        prefix: Path of its shards without extension.
    """

    name: str
    prefix: Path


class ChosenRequests(NamedTuple):
    """Windows of a domain to be scored.

    Attributes:
        requests: The first tokens of each are given, the others are scored.
        document_N: int64 [N], number of the document that each is of.
    """

    requests: list[Request]
    document_N: NDArray[np.int64]


class DomainLoss(NamedTuple):
    """A model's held-out loss on a domain.

    Attributes:
        domain: Its name.
        losses_N: Nats per token of each window, float64 [N].
        document_N: int64 [N], number of the document that each is of.
        num_tokens: Scored tokens.
    """

    domain: str
    losses_N: NDArray[np.float64]
    document_N: NDArray[np.int64]
    num_tokens: int

    @property
    def estimate(self) -> ClusteredEstimate:
        """The mean over windows, with its errors over windows and noise."""
        return clustered_mean(self.losses_N, self.document_N)

    @property
    def perplexity(self) -> float:
        """Exp of the loss; of masked diffusion an upper bound."""
        return math.exp(self.estimate.mean)

    @property
    def perplexity_interval(self) -> tuple[float, float]:
        """Where the perplexity lies, with 95%, by Student's t over documents, or windows of one."""
        mean, error, clustered = self.estimate
        degrees = degrees_of_mean(len(np.unique(self.document_N)))
        if math.isnan(clustered):
            degrees, clustered = degrees_of_mean(len(self.losses_N)), error
        reach = student_reach(clustered, degrees)
        return math.exp(mean - reach), math.exp(mean + reach)


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
        seq_length: Tokens per window, S.
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


def choose_requests(
    windows: SourceWindows, number: int, seed: int, num_given: int = 1
) -> ChosenRequests:
    """Chooses windows of a domain, from as many documents as possible.

    Args:
        windows: Of the domain.
        number: How many, at most.
        seed: Of the choice.
        num_given: Tokens at the start of each that are not scored, fewer than it has.

    Returns:
        The requests.
    """
    chosen = choose_windows(windows, number, (seed, _CHOICE_DOMAIN))
    read = (windows.read(int(window)).tolist() for window in chosen.window_N)
    requests = [Request(tuple(one[:num_given]), tuple(one[num_given:])) for one in read]
    return ChosenRequests(requests, chosen.document_N)


def judge_domain(domain: str, chosen: ChosenRequests, score: ScoreRequests) -> DomainLoss:
    """Judges a model on windows.

    Args:
        domain: Name of the domain.
        chosen: Of `choose_requests`.
        score: Scores with the model.

    Returns:
        The loss.
    """
    sizes_N = np.array([len(request.continuation) for request in chosen.requests])
    scores = score(chosen.requests)
    losses_N = -np.array([found.log_likelihood for found in scores]) / sizes_N
    return DomainLoss(domain, losses_N, chosen.document_N, int(sizes_N.sum()))


def paired_difference(first: DomainLoss, second: DomainLoss) -> ClusteredEstimate:
    """How much higher the second model's loss is, window by window.

    Args:
        first: Of one model.
        second: Of another one, on the same windows.

    Returns:
        Mean difference in nats per token; what the windows have in common is not in its errors.
    """
    return clustered_mean(second.losses_N - first.losses_N, first.document_N)
