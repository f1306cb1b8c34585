"""A plan as text, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from megatron_mdm.config.objective import ObjectiveKind
from megatron_mdm.config.parameters import CONVENTIONS, describe_convention
from megatron_mdm.core.statistics import CONFIDENCE
from megatron_mdm.core.tables import format_table
from megatron_mdm.reporting.figures import (
    OBJECTIVE_COLORS,
    REFERENCE_COLOR,
    TEXT_COLOR,
    fill_band,
    open_figure,
    save_figure,
)
from megatron_mdm.studies.laws.allocation import best_sizes
from megatron_mdm.studies.laws.published import CRITICAL_FACTOR, CRITICAL_UNIQUE_TOKENS
from megatron_mdm.studies.laws.storage import LawFile
from megatron_mdm.studies.sweeps.plan_options import (
    NO_GAIN,
    Option,
    speaks_of_vocabulary,
    uniform_guess_loss,
)
from megatron_mdm.studies.sweeps.planned_run import Cost
from megatron_mdm.studies.sweeps.planner import Plan, convert_published_threshold


def format_plan(plan: Plan, costs: Mapping[ObjectiveKind, Cost], cluster: str) -> list[str]:
    """A plan for the terminal.

    Args:
        plan: The plan.
        costs: What the options take on the cluster, where a layout fits.
        cluster: Its name.

    Returns:
        Lines.
    """
    chosen = plan.options[plan.leaning]
    counted = describe_convention(plan.budget.parameters)
    lines = [
        f"{plan.unique_tokens:.3g} unique tokens, {plan.training_flops:.3g} FLOPs (6 N D, N "
        f"{counted})",
        "",
        f"{_advice(plan)}: {plan.reason}.",
        f"{_run_name(plan)}{chosen.preset}, {chosen.epochs:.3g} epochs.",
        "",
        *format_table(_HEADER, [_row(one, plan, costs) for one in plan.options.values()]),
        "",
        f"MDM overtakes AR at {plan.published_critical_flops:.3g} FLOPs "
        f"({plan.published_band.format('.3g')}), N {counted}, by the published power law "
        f"2.12 x 10^1.956 U^2.174 (U in tokens, FLOPs with embeddings){_own_critical(plan)}.",
    ]
    lines += [
        f"{one.objective} stops at {one.training_flops:.3g} FLOPs: by its law the rest of the "
        f"budget would gain less than {NO_GAIN:g} nats per token."
        for one in plan.options.values()
        if one.stops_early
    ]
    if plan.gains:
        lines += ["", f"At the best size of each, {_name(plan.leaning)} would reach:"]
        lines += [
            f"  with {gain.change}: {gain.loss:.4g} nats per token ({gain.difference:+.3f})"
            for gain in plan.gains
        ]
    for kind, cost in costs.items():
        lines.append(
            f"{kind} on {cost.num_gpus} GPUs ({cluster}), predicted: {cost.steps} steps of "
            f"{cost.step_seconds:.3g} s, {cost.gpu_hours:.3g} GPU hours ({cost.layout})"
        )
    warnings = [*plan.warnings]
    for option in plan.options.values():
        warnings += [f"{option.objective}: {warning}" for warning in option.warnings]
    return [*lines, "", *(f"warning: {warning}" for warning in warnings)] if warnings else lines


def plan_to_tree(plan: Plan, costs: Mapping[ObjectiveKind, Cost]) -> dict[str, Any]:
    """A plan as what JSON can hold.

    Args:
        plan: The plan.
        costs: What the options take.

    Returns:
        A tree of numbers and texts; what is not known is null.
    """
    critical = plan.critical
    return {
        "unique_tokens": plan.unique_tokens,
        "training_flops": plan.training_flops,
        "parameters": plan.budget.parameters,
        "vocab_size": plan.budget.vocab_size,
        "choice": plan.choice,
        "leaning": plan.leaning,
        "reason": plan.reason,
        "options": {kind: _option_to_tree(option) for kind, option in plan.options.items()},
        "published_critical_flops": plan.published_critical_flops,
        "published_band": list(plan.published_band),
        "critical": critical
        and {
            "verdict": critical.verdict,
            "parameters": plan.critical_parameters,
            "flops": critical.flops,
            "interval": critical.interval and list(critical.interval),
            "share_crossing": critical.share_crossing,
        },
        "gains": [gain._asdict() for gain in plan.gains],
        "costs": {kind: cost._asdict() for kind, cost in costs.items()},
        "warnings": list(plan.warnings),
    }


def plot_plan(path: Path, plan: Plan, laws: Mapping[ObjectiveKind, LawFile]) -> None:
    """Draws where the plan stands: against the critical compute, and on the curves of the laws.

    Args:
        path: PNG or SVG to write; its folder is made when absent.
        plan: The plan.
        laws: Laws whose losses are drawn.
    """
    with open_figure(10.5, 4.2, columns=2) as (figure, (left, right)):
        _draw_regions(left, plan)
        _draw_losses(right, plan, laws)
    save_figure(path, figure)


_HEADER = (
    *("", "preset", "N with embeddings", "N without", "tokens", "epochs"),
    *("FLOPs with", "FLOPs without", "nats per token", "GPU hours"),
)


def _row(option: Option, plan: Plan, costs: Mapping[ObjectiveKind, Cost]) -> tuple[str, ...]:
    loss = "not known"
    if option.loss is not None:
        loss = f"{option.loss:.4g}"
        if option.interval is not None:
            loss += f" ({option.interval.format('.4g')})"
    cost = costs.get(option.objective)
    return (
        option.objective,
        option.preset,
        *(f"{option.size.count_in(convention):,.0f}" for convention in CONVENTIONS),
        f"{option.num_tokens:.3g}",
        f"{option.epochs:.3g}",
        *(
            f"{option.size.convert_flops(option.training_flops, plan.budget.parameters, one):.3g}"
            for one in CONVENTIONS
        ),
        loss,
        "no layout fits" if cost is None else f"{cost.gpu_hours:.3g}",
    )


def _own_critical(plan: Plan) -> str:
    critical = plan.critical
    if critical is None:
        return ""
    convention = plan.critical_parameters
    counted = f", N {describe_convention(convention)}" if convention else ""
    if critical.flops is None:
        if critical.verdict == "tie":
            return "; the given laws are one law, and neither overtakes the other"
        where = "nowhere" if critical.verdict == "never" else "from the start"
        return f"; by the given laws, with sizes free, {where}"
    text = f"; at {critical.flops:.3g} by the given laws, with sizes free{counted}"
    if critical.interval is not None:
        text += f" ({CONFIDENCE:.0%} interval {critical.interval.format('.3g')})"
    return text


def _option_to_tree(option: Option) -> dict[str, Any]:
    plain = option._asdict() | {"warnings": list(option.warnings)}
    size = plain.pop("size")
    plain |= {f"num_parameters_{one}": size.count_in(one) for one in CONVENTIONS}
    plain["interval"] = option.interval and list(option.interval)
    return plain


def _advice(plan: Plan) -> str:
    if plan.choice == "either":
        return "Either an autoregressive or a masked-diffusion model may be better"
    return f"Train {_name(plan.choice)}"


def _run_name(plan: Plan) -> str:
    return f"If one has to be chosen, {plan.leaning.upper()}: " if plan.choice == "either" else ""


def _name(kind: ObjectiveKind) -> str:
    return "a masked-diffusion model" if kind == "mdm" else "an autoregressive model"


def _draw_regions(axes: Axes, plan: Plan) -> None:
    low = min(plan.unique_tokens / 10, CRITICAL_UNIQUE_TOKENS[0] / 10)
    high = max(plan.unique_tokens * 10, CRITICAL_UNIQUE_TOKENS[1] * 10)
    tokens = np.geomspace(low, high, 100)
    flops = np.array([convert_published_threshold(one, plan.budget.parameters) for one in tokens])
    least, most = flops / CRITICAL_FACTOR, flops * CRITICAL_FACTOR
    bottom = min(flops.min(), plan.training_flops) / 10
    top = max(flops.max(), plan.training_flops) * 10
    axes.fill_between(tokens, most, top, color=OBJECTIVE_COLORS["mdm"], alpha=0.08, lw=0)
    axes.fill_between(tokens, bottom, least, color=OBJECTIVE_COLORS["ar"], alpha=0.08, lw=0)
    axes.fill_between(tokens, least, most, color=REFERENCE_COLOR, alpha=0.25, lw=0, label="either")
    axes.plot(tokens, flops, color=REFERENCE_COLOR, ls="--", lw=1)
    is_measured = (tokens >= CRITICAL_UNIQUE_TOKENS[0]) & (tokens <= CRITICAL_UNIQUE_TOKENS[1])
    measured = tokens[is_measured], flops[is_measured]
    axes.plot(*measured, color=TEXT_COLOR, lw=2, label="measured range")
    point = TEXT_COLOR if plan.choice == "either" else OBJECTIVE_COLORS[plan.leaning]
    axes.plot(plan.unique_tokens, plan.training_flops, "o", color=point, label="this plan")
    _write(axes, 0.04, 0.94, "MDM ahead", color=OBJECTIVE_COLORS["mdm"], va="top")
    _write(axes, 0.96, 0.06, "AR ahead", color=OBJECTIVE_COLORS["ar"], ha="right")
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        ylim=(bottom, top),
        xlabel="unique tokens",
        ylabel=f"compute, 6 N D (FLOPs), N {describe_convention(plan.budget.parameters)}",
        title="Published critical compute",
    )
    axes.legend(loc="upper center")


def _draw_losses(axes: Axes, plan: Plan, laws: Mapping[ObjectiveKind, LawFile]) -> None:
    flops_C = np.logspace(-3, 2, 80) * plan.training_flops
    drawn = [_draw_law(axes, plan, kind, law, flops_C) for kind, law in laws.items()]
    axes.axvline(plan.training_flops, color=REFERENCE_COLOR, lw=0.8, ls=":")
    axes.set(
        xscale="log",
        xlabel=f"compute, 6 N D (FLOPs), N {describe_convention(plan.budget.parameters)}, "
        "at the best size",
        ylabel="expected loss (nats per token)",
        title=f"{plan.unique_tokens:.3g} unique tokens",
    )
    if any(drawn):
        axes.legend()
        return
    axes.set_yticks([])
    told = "No law says what to expect here."
    _write(axes, 0.04, 0.94, told, color=TEXT_COLOR, va="top")


def _write(axes: Axes, x: float, y: float, text: str, **look: Any) -> None:
    """Writes at shares of the panel, from the left and from the bottom."""
    axes.text(x, y, text, transform=axes.transAxes, **look)


def _draw_law(
    axes: Axes, plan: Plan, kind: ObjectiveKind, law: LawFile, flops_C: NDArray[np.float64]
) -> bool:
    """Draws what a law expects, as far as it reaches; False where that is nowhere."""
    if not speaks_of_vocabulary(law, plan.budget):
        return False
    option, color = plan.options[kind], OBJECTIVE_COLORS[kind]
    # What the law calls so many FLOPs, at the shape of the option.
    ratio = option.size.count_in(law.convention) / option.size.count_in(plan.budget.parameters)
    own_C, limit = flops_C * ratio, uniform_guess_loss(law, plan.budget)
    losses_C = best_sizes([law.law], own_C, plan.unique_tokens)[1][0]
    reached_C = losses_C <= limit
    if not reached_C.any():
        return False
    flops_C, own_C, losses_C = flops_C[reached_C], own_C[reached_C], losses_C[reached_C]
    axes.plot(flops_C, losses_C, color=color, label=kind.upper())
    if law.bootstrap:
        _, losses_LC = best_sizes(law.bootstrap, own_C, plan.unique_tokens)
        fill_band(axes, flops_C, losses_LC, color)
    if option.loss is not None:
        axes.plot(option.training_flops, option.loss, "o", color=color)
        label, place = f"{option.preset}, {option.epochs:.3g} epochs", (6, 6)
        near: Any = {"textcoords": "offset points", "fontsize": 8, "color": TEXT_COLOR}
        axes.annotate(label, (option.training_flops, option.loss), place, **near)
    return True
