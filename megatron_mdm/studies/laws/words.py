"""What fits came to: in words for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mdm.core.statistics import CONFIDENCE, Interval
from megatron_mdm.core.tables import format_table
from megatron_mdm.studies.laws.best_epochs import EpochsAnalysis
from megatron_mdm.studies.laws.comparison import FormComparison
from megatron_mdm.studies.laws.epoch_curves import CurveMinimum
from megatron_mdm.studies.laws.epochs_law import EpochsLaw
from megatron_mdm.studies.laws.fitting import Fit, objective, r_squared
from megatron_mdm.studies.laws.forms import Law
from megatron_mdm.studies.laws.isoflop import IsoFlopAnalysis
from megatron_mdm.studies.laws.runs import REPEATS, Runs
from megatron_mdm.studies.laws.uncertainty import Profile, constant_interval

# Of a long table, so many rows, evenly spaced.
_MOST_ROWS = 16


def format_fit(fit: Fit, runs: Runs, laws: Sequence[Law]) -> list[str]:
    """Describes a fit.

    Args:
        fit: The fit.
        runs: What was fitted.
        laws: Resamples; none for no intervals.

    Returns:
        Lines to print.
    """
    title = f"{CONFIDENCE:.0%} of {len(laws)} resamples" if laws else ""
    rows = []
    for name, about in fit.law.constants().items():
        note = "" if name in fit.fitted else "held"
        if laws and not note:
            note = constant_interval(fit, laws, name).describe()
        rows.append([f"  {name}", about.symbol, f"{getattr(fit.law, name):.7g}", note])
    lines = [
        f"{fit.law.form}, {len(fit.coordinates.free)} constants from {fit.num_starts:,} starts: "
        f"objective {fit.objective:.7f}, R^2 of log loss {r_squared(fit.law, runs):.4f}",
        *format_table(["  constant", "", "value", title], rows, left=(0, 1, 3)),
    ]
    for name in fit.at_limits:
        lines.append(f"  {name} ran off to where the search ends: these runs do not tell it")
    moving = [name for name in fit.law.reuse_names if name in fit.fitted]
    for law in fit.others:
        values = ", ".join(f"{name} {getattr(law, name):.5g}" for name in moving or fit.fitted)
        lines.append(f"  another minimum: objective {objective(law, runs):.7f} at {values}")
    num_repeating = int((runs.epochs > REPEATS).sum())
    if not fit.law.minds_repetition() and num_repeating:
        lines.append(
            f"  {num_repeating} runs repeat data, which this form counts as new: use another form"
        )
    return lines


def format_profile(found: Profile) -> list[str]:
    """Describes a profile.

    Args:
        found: The profile.

    Returns:
        Lines to print.
    """
    lines = [
        f"  profile of {found.name}: {found.interval.describe()} (likelihood ratio, "
        f"{CONFIDENCE:.0%}); lowest objective {found.lowest:.7f}, threshold {found.threshold:.7f}"
    ]
    if found.is_weakly_identified:
        lines.append(
            f"  {found.name} is weakly identified: values that differ more than tenfold fit alike"
        )
    return lines


def format_isoflops(analysis: IsoFlopAnalysis) -> list[str]:
    """Describes an isoFLOP analysis.

    Args:
        analysis: The analysis.

    Returns:
        Lines to print.
    """
    rows = [
        [
            f"  {group.flops:.3g}",
            str(len(group.losses)),
            f"{group.best_parameters:.4g}",
            group.parameters_interval.describe() if group.parameters_interval else "-",
            f"{group.best_tokens:.4g}",
            f"{group.best_loss:.4f}",
        ]
        for group in analysis.groups
    ]
    lines = format_table(["  FLOPs", "runs", "best N", "interval", "best D", "loss"], rows, (0, 3))
    laws = {"N": analysis.size_law, "D": analysis.token_law, "L": analysis.loss_law}
    for letter, law in laws.items():
        if law is not None:
            lines.append(f"  best {letter} = {law.scale:.4g} C^{law.exponent_text}")
    return lines + [f"  warning: {sentence}" for sentence in analysis.warnings()]


def format_epochs(found: EpochsAnalysis, num_resamples: int) -> list[str]:
    """Describes the best numbers of epochs by a fit.

    Args:
        found: What was found.
        num_resamples: Of the bootstrap.

    Returns:
        Lines to print.
    """
    rows = []
    for point in found.points:
        # Where no run is beyond its minimum, the place of it is not known.
        shown = f"{point.epochs:.4g}" if found.num_beyond else "not reached"
        ends = "" if point.interval is None else _describe(point.interval)
        trained = "-" if point.most_epochs is None else f"{point.most_epochs:.4g}"
        place = (f"{point.num_parameters:.4g}", f"{point.unique_tokens:.4g}")
        rows.append([f"  {place[0]}", place[1], shown, ends, trained, f"{point.loss:.4f}"])
    title = f"{CONFIDENCE:.0%} of {num_resamples} resamples" if num_resamples else ""
    heads = ["  N", "U", "best epochs", title, "trained to", "loss there"]
    lines = ["best numbers of epochs by this fit", *format_table(heads, _thin(rows), (0, 3))]
    for point in found.points:
        if point.profile is not None:
            place_text = f"N={point.num_parameters:.4g}, U={point.unique_tokens:.4g}"
            ends = _describe(point.profile.interval)
            lines.append(
                f"  profile at {place_text}: {ends} epochs (likelihood ratio, {CONFIDENCE:.0%})"
            )
    law = found.exponents
    if law is not None:
        exponents = (
            f"U^{law.unique_exponent:.3f}{_in_brackets(law.unique_interval)} / "
            f"N^{law.parameter_exponent:.3f}{_in_brackets(law.parameter_interval)}"
        )
        around = f"N={law.num_parameters:.3g}, U={law.unique_tokens:.3g}"
        lines.append(f"  best epochs ~ {exponents} around {around}")
    if found.share_reached is not None and found.share_reached < 1:
        lines.append(
            f"  in {found.share_reached:.0%} of the resamples a run is beyond its minimum; the "
            "others count as a minimum later than any"
        )
    return lines + [f"  warning: {sentence}" for sentence in found.warnings]


def format_comparison(found: FormComparison) -> list[str]:
    """Describes how well forms predict runs that they were not fitted to.

    Args:
        found: The comparison.

    Returns:
        Lines to print.
    """
    which = {
        "largest": f"held out: the {len(found.rows)} runs of the most compute",
        "pairs": f"held out in turn: all {len(found.rows)} runs, one size and data set at a time",
    }
    rows = []
    for one in found.forms:
        compared = ["", "", "", ""]
        if one.difference is not None and one.ratio is not None:
            ends = [one.interval, one.ratio_interval]
            told = ["not known" if one is None else one.format(".3g") for one in ends]
            compared = [f"{one.difference.mean:.4f}", told[0], f"{one.ratio:.3g}", told[1]]
        numbers = [f"{one.mean_error:.4f}", f"{one.bias:+.4f}", f"{one.fitted_error:.4f}"]
        rows.append([f"  {one.form}", str(one.num_constants), *numbers, *compared])
    title = f"{CONFIDENCE:.0%}"
    heads = ["  form", "fitted", "mean error", "bias", "fitted to all"]
    heads += ["worse by", title, "times", title]
    return [
        f"{which[found.held_out]}; errors in nats per token, paired over {found.num_places} places",
        *format_table(heads, rows, (0, 6, 8)),
        f"  {found.verdict}.",
    ]


def format_curves(minima: Sequence[CurveMinimum], law: EpochsLaw | None, reason: str) -> list[str]:
    """Describes the minima of curves and the power law through them.

    Args:
        minima: Of the curves.
        law: The power law; None where there is none.
        reason: Why there is none.

    Returns:
        Lines to print.
    """
    rows = []
    for one in minima:
        curve = one.curve
        ends = "" if one.interval is None else _describe(one.interval)
        if one.epochs is None and one.interval is None:
            ends = "no clear minimum"
        best = "-" if one.epochs is None else f"{one.epochs:.4g}"
        place = [f"{curve.num_parameters:.4g}", f"{curve.unique_tokens:.4g}"]
        rows.append([f"  {curve.name}", *place, best, ends, f"{one.loss:.4f}"])
    heads = ["  curve", "N", "U", "best epochs", f"{CONFIDENCE:.0%}", "loss there"]
    lines = ["best numbers of epochs by the curves", *format_table(heads, rows, (0, 4))]
    if law is None:
        return [*lines, f"  no power law: {reason}"]
    text = ""
    for sign, letter, exponent in (
        ("", "U", law.unique_exponent),
        ("-", "N", law.parameter_exponent),
    ):
        if exponent is not None:
            sign = "" if text or letter == "U" else sign
            joined = " / " if letter == "N" and text else ""
            shown = f"{letter}^{sign}{exponent.value:.3f}{_in_brackets(exponent.interval)}"
            text += joined + shown
    lines.append(
        f"  best epochs ~ {text} through {law.num_points} of {len(minima)} curves; scatter of "
        f"{law.scatter:.1%} beyond their errors"
    )
    if law.num_points < len(minima):
        lines.append(
            "  curves that are not known to rise again are left out, so the exponents are of those "
            "that do"
        )
    return lines


def _describe(interval: Interval) -> str:
    """An interval of epochs, of which there is no lower end than one."""
    return Interval(interval.low if interval.low > 0 else 1.0, interval.high).describe()


def _in_brackets(interval: Interval | None) -> str:
    return "" if interval is None else f" ({interval.format('.3f')})"


def _thin(rows: list[list[str]]) -> list[list[str]]:
    step = -(-len(rows) // _MOST_ROWS)
    return rows[::step]
