"""Quality of conditional generation against its speed: what is tried, and what is measured.

A masked-diffusion model continues held-out prompts with few or many steps, with or without
guidance; an autoregressive model continues the same ones with a key-value cache. A third model
judges both.

Letters: N texts.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import product
from operator import ge
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_mdm.config.objective import ObjectiveKind
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.options import FLATTENED, check_at_least, option_name
from megatron_mdm.core.statistics import (
    Estimate,
    Interval,
    degrees_of_mean,
    mean_with_standard_error,
    student_interval,
)
from megatron_mdm.diffusion.decoding import ORDERS, Decoding, derive_seeds
from megatron_mdm.inference.models import TextModel
from megatron_mdm.inference.repetition import distinct_n, token_entropy
from megatron_mdm.inference.requests import Request
from megatron_mdm.inference.sampling import Draft, generate, plan_batches
from megatron_mdm.studies.papers.text_quality import (
    TextLosses,
    nats_per_token,
)

DISTINCT = (1, 2, 3)
_MOST_TEXTS_AT_ONCE = 32


@dataclass(frozen=True)
class Way:
    """One way to write.

    Attributes:
        objective: Of the model that writes.
        temperature: Of the softmax that tokens are drawn from.
        top_p: Only the likeliest tokens of so much probability; None: all.
        order: Of masked diffusion; empty for an autoregressive model.
        guidance_scale: w, 0 for none.
        num_steps: Forward passes of masked diffusion; None: one per token.
    """

    objective: ObjectiveKind
    temperature: float
    top_p: float | None = None
    order: str = ""
    guidance_scale: float = 0.0
    num_steps: int | None = None

    @property
    def line(self) -> str:
        """What it shares with the ways that differ in their number of steps alone."""
        parts = [self.objective.upper()]
        if self.order:
            parts.append(self.order.replace("_", " "))
        parts.append(f"T={self.temperature:g}")
        if self.top_p is not None:
            parts.append(f"top-p={self.top_p:g}")
        if self.objective == "mdm":
            parts.append(f"w={self.guidance_scale:g}")
        return " ".join(parts)

    @property
    def name(self) -> str:
        """How to call it among all ways."""
        return self.line if self.num_steps is None else f"{self.line}, {self.num_steps} steps"


@FLATTENED
@dataclass(frozen=True, kw_only=True)
class TradeoffOptions:
    """What is tried.

    Attributes:
        steps: Numbers of steps of masked diffusion.
        guidance: Scales w of unsupervised guidance, 0 for none.
        order: In which masks are unmasked: confidence, entropy, margin, random, left_to_right or
            ancestral.
        temperature: Of masked diffusion, above 0.
        ar_temperature: Of the autoregressive model, above 0.
        top_p: Of the autoregressive model; 1 is all tokens.
        block_length: Masked diffusion fills blocks of so many tokens; all at once where not given.
        cache: Masked diffusion keeps keys and values within a block, an approximation.
        num_prompts: Texts of each way.
        prompt_tokens: Tokens that are given.
        new_tokens: Tokens that are written.
        batch_sizes: Texts that are written at once, where speed is measured.
        repeats: Rounds of timings.
        seed: Of prompts and samples.
    """

    steps: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    guidance: tuple[float, ...] = (0.0, 0.5, 1.0)
    order: tuple[str, ...] = ("random",)
    temperature: tuple[float, ...] = (1.0,)
    ar_temperature: tuple[float, ...] = (1.0, 0.9, 0.8)
    top_p: tuple[float, ...] = (1.0,)
    block_length: int | None = None
    cache: bool = False
    num_prompts: int = 64
    prompt_tokens: int = 64
    new_tokens: int = 128
    batch_sizes: tuple[int, ...] = (1, 8)
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks what can be checked without the models."""
        for option in fields(self):
            if getattr(self, option.name) == ():
                raise ConfigError(f"{option_name(option.name)} is empty: give at least one.")
        num_blocks = -(-self.new_tokens // max(1, self.block_length or self.new_tokens))
        check_at_least(self, num_prompts=2, seed=0, steps=max(1, num_blocks))
        for name, limit in (("steps", "new_tokens"), ("batch_sizes", "num_prompts")):
            most = getattr(self, limit)
            rule = f"no more than {option_name(limit)}={most}"
            self._check(name, partial(ge, most), rule)
        for name in ("temperature", "ar_temperature"):
            # The best token alone would be no sample.
            self._check(name, lambda value: value > 0, "above 0, for a sample to be drawn")
        self._check("order", lambda value: value in ORDERS, f"one of {', '.join(ORDERS)}")
        for way in self.ways:
            try:
                Decoding(**self.decoding(way))
            except ValueError as error:
                raise ConfigError(str(error)) from None

    def _check(self, name: str, is_valid: Callable[[Any], bool], rule: str) -> None:
        found = getattr(self, name)
        for value in found if isinstance(found, tuple) else [found]:
            if value is not None and not is_valid(value):
                shown = f"{value:g}" if isinstance(value, float) else value
                raise ConfigError(f"{option_name(name)}={shown} is not valid: it has to be {rule}.")

    @property
    def ways(self) -> list[Way]:
        """All of them: line by line of masked diffusion, then the autoregressive ones."""
        masked = product(self.order, self.temperature, self.guidance, sorted(self.steps))
        ways = [
            Way("mdm", temperature, None, order, scale, steps)
            for order, temperature, scale, steps in masked
        ]
        ways += [
            Way("ar", temperature, None if top_p == 1 else top_p)
            for temperature, top_p in product(self.ar_temperature, self.top_p)
        ]
        return list(dict.fromkeys(ways))

    def decoding(self, way: Way) -> dict[str, Any]:
        """Options of the sampler.

        Args:
            way: Of `ways`.

        Returns:
            Those of `Decoding`, by name.
        """
        options: dict[str, Any] = {"temperature": way.temperature, "top_p": way.top_p}
        if way.objective == "mdm":
            options |= {
                "order": way.order,
                "num_steps": way.num_steps,
                "guidance_scale": way.guidance_scale,
                "block_length": self.block_length,
            }
        return options


class Quality(NamedTuple):
    """What a way's texts are like.

    Attributes:
        losses: Of the judge.
        entropies_N: float64 [N], `token_entropy` of each text, nats.
        distinct: `distinct_n` for each n of `DISTINCT`.
    """

    losses: TextLosses
    entropies_N: NDArray[np.float64]
    distinct: tuple[float, ...]

    @property
    def loss(self) -> Estimate:
        """Nats per token, with a standard error over texts."""
        return nats_per_token(self.losses)

    @property
    def perplexity(self) -> float:
        """Generative perplexity under the judge."""
        return math.exp(self.loss.mean)

    @property
    def perplexity_interval(self) -> Interval:
        """Where the perplexity lies, by Student's t over texts; nan for one text."""
        found = student_interval(*self.loss, degrees_of_mean(len(self.losses.nats_N)))
        return Interval(*map(math.exp, found))

    @property
    def entropy(self) -> Estimate:
        """Mean entropy of a text, nats, with a standard error over texts."""
        return mean_with_standard_error(self.entropies_N)


@dataclass(frozen=True)
class Measured:
    """What a way came to.

    Attributes:
        way: The way.
        quality: Of its texts.
        example: The first of them, prompt and all, as text.
        seconds: Of each round, by batch size: for that many texts.
    """

    way: Way
    quality: Quality
    example: tuple[str, str]
    seconds: dict[int, list[float]] = field(default_factory=dict)

    def tokens_per_second(self, batch_size: int, new_tokens: int) -> float:
        """Speed of all texts of a batch together, each of so many tokens: median over rounds."""
        return batch_size * new_tokens / statistics.median(self.seconds[batch_size])

    def speed_over(self, base: Measured, batch_size: int) -> float:
        """How many times the tokens per second of another way: median over rounds, in pairs."""
        rounds = zip(self.seconds[batch_size], base.seconds[batch_size], strict=True)
        return statistics.median(other / own for own, other in rounds)


def group_by_line(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Ways of masked diffusion that differ in their number of steps alone, by line."""
    lines: dict[str, list[Measured]] = {}
    for one in measured:
        if one.way.objective == "mdm":
            lines.setdefault(one.way.line, []).append(one)
    return lines


def select_autoregressive(measured: Sequence[Measured]) -> list[Measured]:
    """The ways of the autoregressive model."""
    return [one for one in measured if one.way.objective == "ar"]


def measure_quality(texts: Sequence[Request], losses: TextLosses) -> Quality:
    """Measures texts.

    Args:
        texts: Prompts and what follows, in the tokens of the model that wrote it; not empty.
        losses: What the judge says of them.

    Returns:
        Their quality.
    """
    written = [text.continuation for text in texts]
    return Quality(
        losses,
        np.array([token_entropy(tokens) for tokens in written], dtype=np.float64),
        tuple(distinct_n(written, n) for n in DISTINCT),
    )


def write_texts(
    model: TextModel, way: Way, prompts: Sequence[tuple[int, ...]], options: TradeoffOptions
) -> list[Request]:
    """Continues prompts. The end of a text is a token as any other, as it was in training.

    Args:
        model: Of the way's objective.
        way: How.
        prompts: Token ids, all of one length.
        options: How much.

    Returns:
        Each prompt with `new_tokens` that follow it.

    Raises:
        ConfigError: The model cannot do it.
    """
    drafts = _drafts(model, way, prompts, options)
    samples = generate(model, drafts, _MOST_TEXTS_AT_ONCE, progress=False)
    cut = options.prompt_tokens
    return [Request(tuple(one.ids[:cut]), tuple(one.ids[cut:])) for one in samples]


def time_ways(
    models: dict[str, TextModel],
    measured: Sequence[Measured],
    prompts: Sequence[tuple[int, ...]],
    options: TradeoffOptions,
) -> None:
    """Measures the time of all ways in turn, again and again, after one of each line to warm up.

    Args:
        models: By objective.
        measured: Gets the seconds, for each batch size and round.
        prompts: As many as the largest batch at least.
        options: Batch sizes and rounds.
    """
    # The first of a line has the fewest steps.
    firsts = {one.way.line: one for one in reversed(measured)}
    for batch_size in options.batch_sizes:
        given = prompts[:batch_size]
        for one in firsts.values():
            _seconds(models[one.way.objective], one.way, given, options)
        rounds = range(options.repeats)
        told = f"timing {batch_size} at once"
        for _ in tqdm(rounds, unit="round", desc=told, leave=False, disable=None):
            for one in measured:
                seconds = _seconds(models[one.way.objective], one.way, given, options)
                one.seconds.setdefault(batch_size, []).append(seconds)


def _seconds(
    model: TextModel, way: Way, prompts: Sequence[tuple[int, ...]], options: TradeoffOptions
) -> float:
    planned = plan_batches(_drafts(model, way, prompts, options), len(prompts), model.facts)
    batches = [batch for _, batch in planned]
    start = time.perf_counter()
    for batch in batches:
        model.complete(batch)
    return time.perf_counter() - start


def _drafts(
    model: TextModel, way: Way, prompts: Sequence[tuple[int, ...]], options: TradeoffOptions
) -> list[Draft]:
    # Without a token that ends a text: all texts are to be of one length.
    decoding = Decoding(
        max_new_tokens=options.new_tokens,
        use_cache=options.cache and way.objective == "mdm",
        stop_at_end=False,
        **options.decoding(way),
    )
    masks = (model.facts.mask_token_id,) * options.new_tokens
    # Guidance compares with a prompt of masks, which needs no special training.
    unseen = (model.facts.mask_token_id,) * (options.prompt_tokens + options.new_tokens)
    guidance = unseen if way.guidance_scale else None
    seeds = derive_seeds(options.seed, len(prompts))
    return [
        Draft(Request(prompt, masks), decoding, seed, number, guidance=guidance)
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
