"""The report of a trade-off."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_mdm.core.statistics import CONFIDENCE
from megatron_mdm.inference.text_quality import nats_per_token
from megatron_mdm.reporting.pages import (
    Facts,
    Heading,
    Paragraph,
    Picture,
    Report,
    Sample,
    Table,
)
from megatron_mdm.reporting.run_folder import flatten
from megatron_mdm.studies.machine import describe_machine
from megatron_mdm.studies.papers.tradeoff import (
    DISTINCT,
    Measured,
    Quality,
    TradeoffOptions,
)
from megatron_mdm.studies.papers.tradeoff_findings import (
    Findings,
    entropy_of,
    perplexity_interval,
    shown_estimate,
    shown_interval,
    shown_perplexity,
    summary,
)
from megatron_mdm.studies.papers.tradeoff_matching import Match, relative_speed
from megatron_mdm.studies.papers.tradeoff_plot import draw_tradeoff

_CAPTION = (
    "Bars: 95% intervals over texts. Numbers: steps of masked diffusion, of one line. Right: lower "
    "and further to the right is better; what is likely with little entropy repeats itself. Star: "
    "real texts."
)
_NOTE = (
    "Perplexity under the judge, of what follows the prompts, with its 95% interval over texts; "
    "entropy of a text's tokens in nats; distinct-n over all texts; tokens per second of all texts "
    "of a batch together, median over rounds."
)
_MATCH_NOTE = (
    "Where a line of masked diffusion has the perplexity of the autoregressive texts, between two "
    "measured numbers of steps; better: it has it even at the fewest that were measured. Interval "
    f"of {CONFIDENCE:.0%} over texts; reached in: share of resamples of the texts in which the "
    "perplexity is reached at all."
)


def write_tradeoff(folder: Path, findings: Findings) -> dict[str, Path]:
    """Writes the report.

    Args:
        folder: Where; made when absent.
        findings: What was measured.

    Returns:
        Paths of the page, the picture, the tables and all figures, by ending.
    """
    # Of each line the way with the most steps.
    shown = {one.way.line: one for one in findings.measured}.values()
    return Report(
        name="tradeoff",
        title="Quality against speed",
        subtitle="Held-out prompts continued by masked diffusion and by autoregression with a "
        "key-value cache",
        parts=[
            *map(Paragraph, summary(findings)),
            Picture(draw_tradeoff(findings.options, findings.real, findings.measured), _CAPTION),
            Heading("Ways to write"),
            ways_table(findings),
            Heading("Speed at matched perplexity"),
            matches_table(findings),
            Heading("What was written"),
            *(Sample(one.way.name, *one.example) for one in shown),
            Heading("How it was measured"),
            Facts(_facts(findings)),
        ],
        tree=as_tree(findings),
    ).write(folder)


def ways_table(findings: Findings) -> Table:
    """Every way with its figures.

    Args:
        findings: What was measured.

    Returns:
        A row for each.
    """
    sizes = findings.options.batch_sizes
    heads = ["way", "perplexity", "nats per token", "entropy"]
    heads += [f"distinct-{n}" for n in DISTINCT]
    for size in sizes:
        heads += [f"tokens/s, {size} at once", f"times {findings.reference.way.name}"]
    rows = [["real texts", *_quality_cells(findings.real), *[""] * (2 * len(sizes))]]
    for one in findings.measured:
        row = [one.way.name, *_quality_cells(one.quality)]
        for size in sizes:
            row.append(f"{tokens_per_second(one, size, findings.options):,.0f}")
            row.append(f"{relative_speed(one, findings.reference, size):.2f}")
        rows.append(row)
    return Table(heads, rows, _NOTE)


def matches_table(findings: Findings) -> Table:
    """Every match with its figures.

    Args:
        findings: What was measured.

    Returns:
        A row for each.
    """
    heads = ["at once", "AR", "MDM", "verdict", "steps", "times AR's speed", "interval"]
    heads += ["reached in", "entropy", "less AR's"]
    rows = []
    for one in findings.matches:
        is_reached = one.verdict != "not_reached"
        speed = f"{'≥ ' * (one.verdict == 'better')}{one.relative_speed:.2f}"
        rows.append(
            [
                f"{one.batch_size}",
                one.ar,
                one.line,
                one.verdict.replace("_", " "),
                "-".join(f"{steps}" for steps in sorted(set(one.steps))) if is_reached else "",
                speed if is_reached else "",
                shown_interval(one) if one.verdict == "matched" else "",
                f"{one.share_reached:.0%}",
                f"{one.entropy:.3f}" if is_reached else "",
                shown_estimate(one.entropy_difference, "+") if is_reached else "",
            ]
        )
    return Table(heads, rows, _MATCH_NOTE)


def tokens_per_second(one: Measured, batch_size: int, options: TradeoffOptions) -> float:
    """Speed of a way, of all texts of a batch together.

    Args:
        one: The way.
        batch_size: Texts at once.
        options: Tokens of each.

    Returns:
        Median over rounds.
    """
    return batch_size * options.new_tokens / statistics.median(one.seconds[batch_size])


def as_tree(findings: Findings) -> dict[str, Any]:
    """Everything as JSON values.

    Args:
        findings: What was measured.

    Returns:
        The tree.
    """
    return {
        "options": asdict(findings.options),
        **findings.folders,
        "judge_retokenizes": findings.judge_retokenizes,
        "dtype": findings.dtype,
        "machine": _machine(),
        "real": _quality_tree(findings.real),
        "ways": [
            asdict(one.way)
            | {"name": one.way.name}
            | _quality_tree(one.quality)
            | {
                "seconds": one.seconds,
                "tokens_per_second": {
                    size: tokens_per_second(one, size, findings.options) for size in one.seconds
                },
                "example": one.example,
            }
            for one in findings.measured
        ],
        "matches": [_match_tree(one) for one in findings.matches],
    }


def _match_tree(one: Match) -> dict[str, Any]:
    return one._asdict() | {"entropy_difference": list(one.entropy_difference)}


def _quality_tree(quality: Quality) -> dict[str, Any]:
    loss, entropy = nats_per_token(quality.losses), entropy_of(quality)
    low, high = perplexity_interval(quality.losses)
    return {
        "nats_per_token": loss.mean,
        "standard_error": loss.standard_error,
        "perplexity": math.exp(loss.mean),
        "perplexity_interval": [low, high],
        "entropy": entropy.mean,
        "entropy_standard_error": entropy.standard_error,
        **{f"distinct_{n}": share for n, share in zip(DISTINCT, quality.distinct, strict=True)},
        "nats_of_texts": quality.losses.nats_N.tolist(),
        "tokens_of_texts": quality.losses.tokens_N.tolist(),
        "entropy_of_texts": quality.entropies_N.tolist(),
    }


def _quality_cells(quality: Quality) -> list[str]:
    cells = [shown_perplexity(quality), shown_estimate(nats_per_token(quality.losses))]
    cells.append(shown_estimate(entropy_of(quality)))
    return cells + [f"{share:.3f}" for share in quality.distinct]


def _facts(findings: Findings) -> list[tuple[str, str]]:
    options, folders = findings.options, findings.folders
    judge = folders["judge"] + (", texts encoded anew" if findings.judge_retokenizes else "")
    return [
        ("masked diffusion", folders["mdm"]),
        ("autoregressive, key-value cache", folders["ar"]),
        ("judge", judge),
        ("prompts", f"{options.num_prompts} windows of {folders['data']}"),
        ("tokens", f"{options.prompt_tokens} given, {options.new_tokens} written"),
        ("blocks of masked diffusion", f"{options.block_length or 'none'}"),
        ("its keys and values", "kept within a block" if options.cache else "computed each step"),
        ("dtype", findings.dtype),
        ("rounds of timings", f"{options.repeats}"),
        ("seed", f"{options.seed}"),
        *((name.replace("_", " "), f"{value}") for name, value in flatten(_machine())),
    ]


def _machine() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "threads": torch.get_num_threads()} | describe_machine()
