"""What a trade-off found, in words and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_mdm.core.statistics import Estimate, degrees_of_mean, student_interval
from megatron_mdm.studies.papers.tradeoff import (
    Measured,
    Quality,
    TradeoffOptions,
    select_autoregressive,
)
from megatron_mdm.studies.papers.tradeoff_matching import Match, match_all


@dataclass(frozen=True)
class Findings:
    """All that was measured.

    Attributes:
        options: What was tried.
        real: The held-out texts themselves.
        measured: Each way, at least one of each objective.
        folders: Of mdm, ar and judge, and the shards of data.
        judge_retokenizes: The judge has another tokenizer than the models that write.
        dtype: Of these models.
    """

    options: TradeoffOptions
    real: Quality
    measured: Sequence[Measured]
    folders: dict[str, str]
    judge_retokenizes: bool
    dtype: str

    @cached_property
    def matches(self) -> list[Match]:
        """Every line of masked diffusion against every autoregressive way."""
        return match_all(self.measured, self.options.batch_sizes, self.options.seed)

    @property
    def reference(self) -> Measured:
        """The autoregressive way closest to the model's own distribution: all tokens, T near 1."""
        return min(
            select_autoregressive(self.measured),
            key=lambda one: (one.way.top_p is not None, abs(math.log(one.way.temperature))),
        )


def summarize_findings(findings: Findings) -> list[str]:
    """Says in words what came out, against the autoregressive way of the model's own distribution.

    Args:
        findings: What was measured.

    Returns:
        Sentences: on the real texts, and for each batch size.
    """
    real, base = findings.real, findings.reference
    sentences = [
        f"Real texts have a perplexity of {format_perplexity(real)} under the judge and an entropy "
        f"of {format_estimate(real.entropy)}; {base.way.name} has "
        f"{format_perplexity(base.quality)} and {format_estimate(base.quality.entropy)}."
    ]
    if Path(findings.folders["judge"]).resolve() == Path(findings.folders["ar"]).resolve():
        sentences.append("The judge is the autoregressive model itself, whose texts it flatters.")
    for batch_size in findings.options.batch_sizes:
        found = [
            one
            for one in findings.matches
            if one.batch_size == batch_size and one.ar == base.way.name
        ]
        best = choose_match(found)
        if best.verdict != "not_reached" and is_less_varied(best):
            sentences.append(
                f"No line of masked diffusion has the perplexity of {base.way.name} in texts that "
                "are as varied. " + describe_match(best)
            )
        else:
            sentences.append(describe_match(best))
    return sentences


def choose_match(matches: Sequence[Match]) -> Match:
    """The fastest line that is as likely and as varied; or as likely; or the likeliest.

    Args:
        matches: Against one autoregressive way, at one batch size.

    Returns:
        One of them.
    """
    return max(
        matches,
        key=lambda one: (
            one.verdict != "not_reached",
            one.verdict != "not_reached" and not is_less_varied(one),
            one.relative_speed if one.verdict != "not_reached" else -one.loss,
        ),
    )


def is_less_varied(one: Match) -> bool:
    """Is the entropy of masked diffusion lower there, by more than noise?

    Args:
        one: A match.

    Returns:
        Whether the 95% interval of the difference lies below 0.
    """
    return student_interval(*one.entropy_difference, degrees_of_mean(one.num_texts)).high < 0


def describe_match(one: Match) -> str:
    """Says in words what a match found.

    Args:
        one: The match.

    Returns:
        Sentences.
    """
    at_once = f"{one.batch_size} text{'s' * (one.batch_size > 1)} at once: "
    slower, faster = max(one.steps), min(one.steps)
    steps = f"{slower} steps" if slower == faster else f"{faster} to {slower} steps"
    mean, error = one.entropy_difference
    side = "above" if mean >= 0 else "below"
    varied = ", so it is less varied" if is_less_varied(one) else ""
    difference = f"{abs(mean):.3f} ± {error:.3f} {side} AR's{varied}."
    entropy = f"Its entropy there is {one.entropy:.3f}, {difference}"
    if one.verdict == "not_reached":
        return (
            f"{at_once}no line of masked diffusion reaches the perplexity of {one.ar}; the "
            f"closest is {one.line} with {steps}, {math.exp(one.loss):.2f}, at "
            f"{one.relative_speed:.2f} times AR's tokens per second. {entropy}"
        )
    if one.verdict == "better":
        return (
            f"{at_once}{one.line} is as likely as {one.ar} even with {steps}, and writes at least "
            f"{one.relative_speed:.2f} times as many tokens per second. "
            f"{entropy}"
        )
    return (
        f"{at_once}{one.line} is as likely as {one.ar} at {steps}, where it writes "
        f"{one.relative_speed:.2f} ({format_interval(one)}) times as many tokens per second. "
        f"{entropy}"
    )


def format_perplexity(quality: Quality) -> str:
    """Perplexity with its interval.

    Args:
        quality: Of the texts.

    Returns:
        Text.
    """
    low, high = quality.perplexity_interval
    return f"{quality.perplexity:.2f} [{low:.2f}, {high:.2f}]"


def format_estimate(estimate: Estimate, sign: str = "") -> str:
    """A mean with its standard error.

    Args:
        estimate: The mean.
        sign: "+" shows the sign of positive ones.

    Returns:
        Text.
    """
    return f"{estimate.mean:{sign}.3f} ± {estimate.standard_error:.3f}"


def format_interval(one: Match) -> str:
    """Where the relative speed of a match lies.

    Args:
        one: The match.

    Returns:
        Text.
    """
    ends = ["not reached" if end is None else f"{end:.2f}" for end in one.interval]
    return " to ".join(ends)
