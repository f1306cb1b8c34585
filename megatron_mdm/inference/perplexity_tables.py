"""Tables of held-out losses: models beside each other, and how each changes with time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_mdm.core.statistics import ClusteredEstimate
from megatron_mdm.core.tables import format_markdown_table
from megatron_mdm.inference.perplexity import DomainLoss, paired_difference

Losses = Mapping[str, Sequence[DomainLoss]]


def format_loss_table(found: Losses) -> str:
    """Losses and perplexities of models on shard sets.

    Args:
        found: For each model the losses on the same shard sets, in the same order.

    Returns:
        Lines of Markdown; the first model is what the others are compared with.
    """
    models = list(found)
    first = found[models[0]]
    heads = ["shards", "tokens"]
    heads += [f"{label} {model}" for model in models for label in ("perplexity of", "loss of")]
    heads += [f"{model} less {models[0]}" for model in models[1:]]
    rows = []
    for place, base in enumerate(first):
        losses = [found[model][place] for model in models]
        row = [base.domain, f"{base.num_tokens:,}"]
        for loss in losses:
            low, high = loss.perplexity_interval
            row += [f"{loss.perplexity:.2f} [{low:.2f}, {high:.2f}]", _format(loss.estimate)]
        row += [_format(paired_difference(base, loss), sign="+") for loss in losses[1:]]
        rows.append(row)
    return format_markdown_table(heads, rows)


def format_shift_table(found: Losses, since: str) -> str:
    """How much higher losses are than on one of the shard sets: the temporal shift.

    Args:
        found: As for `format_loss_table`.
        since: Name of the shard set that the others are compared with, such as the slice of time
            in which training ended.

    Returns:
        Lines of Markdown: for each other shard set the change of each model, and how much more
        each changes than the first model.
    """
    models = list(found)
    names = [loss.domain for loss in found[models[0]]]
    base = names.index(since)
    heads = ["shards", *(f"change of {model}" for model in models)]
    heads += [f"change of {model} less that of {models[0]}" for model in models[1:]]
    rows = []
    for place, name in enumerate(names):
        if place == base:
            continue
        changes = [
            _compare(found[model][base].estimate, found[model][place].estimate) for model in models
        ]
        row = [name, *(_format(change, sign="+") for change in changes)]
        for model in models[1:]:
            # Window by window, since models have windows in common.
            pairs = [
                paired_difference(found[models[0]][index], found[model][index])
                for index in (base, place)
            ]
            row.append(_format(_compare(*pairs), sign="+"))
        rows.append(row)
    return format_markdown_table(heads, rows)


def _compare(first: ClusteredEstimate, second: ClusteredEstimate) -> ClusteredEstimate:
    """Windows of different shard sets are independent."""
    return ClusteredEstimate(
        second.mean - first.mean,
        math.hypot(first.standard_error, second.standard_error),
        math.hypot(first.clustered_error, second.clustered_error),
    )


def _format(estimate: ClusteredEstimate, sign: str = "") -> str:
    text = f"{estimate.mean:{sign}.4f} ± {estimate.standard_error:.4f}"
    if math.isnan(estimate.clustered_error):
        return text
    return f"{text} ({estimate.clustered_error:.4f})"
