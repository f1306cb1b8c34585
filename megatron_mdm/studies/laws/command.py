"""The command that fits a law to a table of runs: what is asked, done, printed and written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from megatron_mdm.config.objective import ObjectiveKind
from megatron_mdm.config.parameters import CONVENTIONS, ParameterConvention, describe_convention
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.options import FLATTENED, REPEATED
from megatron_mdm.core.statistics import CONFIDENCE, Interval
from megatron_mdm.core.tables import format_table
from megatron_mdm.studies.laws import plots
from megatron_mdm.studies.laws.fitting import Fit, fit_law, objective, r_squared
from megatron_mdm.studies.laws.forms import FORMS, Law
from megatron_mdm.studies.laws.isoflop import IsoFlopAnalysis, analyze_isoflops
from megatron_mdm.studies.laws.runs import REPEATS, Runs, RunsTable, read_runs
from megatron_mdm.studies.laws.storage import LawFile, find_ranges, write_law
from megatron_mdm.studies.laws.uncertainty import Profile, bootstrap, constant_interval, profile


@FLATTENED
@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """What to fit and what to write.

    Attributes:
        form: chinchilla, data_constrained, geometric or package.module:Class; without it only
            --isoflop is done.
        fit: NAME,NAME: constants to fit; by default all that are not held.
        hold: NAME=VALUE: a constant that keeps a value.
        tie_exponents: Fit alpha = beta.
        bootstrap: Resamples of the runs, for intervals.
        seed: Of the bootstrap.
        profile: NAME or NAME=LOW:HIGH: a constant to profile, and where.
        isoflop: Fit parabolas through runs of equal 6 N D.
        objective: Take the runs of this objective; the law file says so.
        column: QUANTITY=NAME, such as loss=NAME: a column's other name.
        parameters: Which N the table holds, or which of a sweep's two columns to take.
        skip_failed: Leave out runs without a usable loss.
        out: Folder for law.json and plots.
    """

    form: str | None = None
    fit: str | None = None
    hold: Annotated[tuple[str, ...], REPEATED] = ()
    tie_exponents: bool = False
    bootstrap: int = 0
    seed: int = 0
    profile: Annotated[tuple[str, ...], REPEATED] = ()
    isoflop: bool = False
    objective: ObjectiveKind | None = None
    column: Annotated[tuple[str, ...], REPEATED] = ()
    parameters: ParameterConvention | None = None
    skip_failed: bool = False
    out: Path | None = None


def fit_and_report(table: Path, settings: FitSettings) -> list[str]:
    """Fits, writes what was asked for, and describes it.

    Args:
        table: CSV or Parquet, a row a run.
        settings: What is asked.

    Returns:
        Lines to print.

    Raises:
        MdmError: The settings or the runs are not valid.
    """
    form, held = _check(settings)
    found = read_runs(
        table,
        columns=_read_pairs("--column", settings.column),
        objective=settings.objective,
        skip_failed=settings.skip_failed,
        parameters=settings.parameters,
    )
    lines = _table_lines(table, found)
    if form is not None:
        lines += ["", *_fit(form, held, settings, table.name, found)]
    if settings.isoflop:
        analysis = analyze_isoflops(found.runs)
        lines += ["", *format_isoflops(analysis)]
        if settings.out is not None:
            plots.plot_isoflops(
                settings.out / "isoflops.png",
                analysis,
                found.parameters,
                objective=found.objective,
            )
    return lines + (["", f"written to {settings.out}"] if settings.out is not None else [])


def _fit(
    form: type[Law], held: dict[str, float], settings: FitSettings, name: str, table: RunsTable
) -> list[str]:
    runs, out = table.runs, settings.out
    of: Any = {"objective": table.objective}
    fit = fit_law(runs, form, held=held, tie_exponents=settings.tie_exponents)
    laws = bootstrap(runs, fit, settings.bootstrap, settings.seed)
    lines = format_fit(fit, runs, laws)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        # The law first: it stays though a plot or profile should fail.
        content = LawFile(
            law=fit.law,
            parameters=table.parameters,
            objective=settings.objective,
            fitted=fit.fitted,
            huber_objective=fit.objective,
            num_runs=len(runs),
            ranges=find_ranges(runs),
            bootstrap=tuple(laws),
            source=f"fitted to {name}",
        )
        write_law(out / "law.json", content)
        if table.parameters is None:
            lines.append(
                "  the law file does not say which N it takes, and the planner will not take it: "
                f"give --parameters {' or '.join(CONVENTIONS)}"
            )
        plots.plot_predictions(out / "predictions.png", fit.law, runs)
        plots.plot_compute(
            out / "compute.png", fit.law, runs, laws, **of, parameters=table.parameters
        )
        if fit.law.reuse_names:
            plots.plot_effective_data(out / "effective_data.png", fit.law, runs, laws, **of)
    for constant, reach in _profile_reaches(settings.profile).items():
        found = profile(runs, fit, constant, reach)
        lines += format_profile(found)
        if out is not None:
            symbol = form.constants()[constant].symbol
            plots.plot_profile(out / f"profile_{constant}.png", found, symbol, **of)
    return lines


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
    if not fit.law.reuse_names and num_repeating:
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


def _table_lines(path: Path, table: RunsTable) -> list[str]:
    letters = {"num_parameters": "N", "num_tokens": "D", "unique_tokens": "U", "epochs": "epochs"}
    spans = ", ".join(
        f"{letters[name]} {low:.3g} to {high:.3g}"
        for name, (low, high) in find_ranges(table.runs).items()
    )
    counted = "" if table.parameters is None else f"; N {describe_convention(table.parameters)}"
    lines = [f"{len(table.runs)} runs of {path}: {spans}{counted}"]
    if table.left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in table.left_out.items())
        lines.append(f"left out: {reasons}")
    return lines


def _check(settings: FitSettings) -> tuple[type[Law] | None, dict[str, float]]:
    """The form and the held constants, before anything is read."""
    if settings.out is not None and settings.out.exists() and not settings.out.is_dir():
        raise ConfigError(f"--out {settings.out} is a file: name a folder.")
    if settings.form is None and not settings.isoflop:
        raise ConfigError(
            f"Nothing is asked for: give --form ({', '.join(FORMS.names)}) or --isoflop."
        )
    if settings.form is None:
        return None, {}
    form = FORMS.find(settings.form, "--form")
    if settings.bootstrap < 0:
        raise ConfigError(f"--bootstrap {settings.bootstrap} is not valid: give 0 or more.")
    held = {}
    for name, text in _read_pairs("--hold", settings.hold).items():
        try:
            held[name] = float(text)
        except ValueError:
            raise ConfigError(f"--hold {name}={text} is not valid: give a number.") from None
    asked = settings.fit.split(",") if settings.fit is not None else []
    for name in (*held, *asked, *_profile_reaches(settings.profile)):
        if name not in form.names():
            raise ConfigError(
                f"{name} is no constant of the form {form.form}: use {', '.join(form.names())}."
            )
    for name in held.keys() & _profile_reaches(settings.profile).keys():
        raise ConfigError(f"--profile {name} needs a fit of it: leave out --hold {name}.")
    for name in form.names() if asked else ():
        if (name in asked) == (name in held):
            state = "both fitted and held" if name in held else "neither fitted nor held"
            raise ConfigError(f"{name} is {state}: name it in --fit, or give --hold {name}=X.")
    return form, held


def _read_pairs(option: str, pairs: Sequence[str]) -> dict[str, str]:
    """Reads `NAME=VALUE` arguments."""
    named = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not (name and sign and value):
            raise ConfigError(f"{option} {pair} is not valid: give NAME=VALUE.")
        named[name] = value
    return named


def _profile_reaches(profiles: Sequence[str]) -> dict[str, Interval | None]:
    """Reads `NAME` or `NAME=LOW:HIGH` arguments."""
    reaches: dict[str, Interval | None] = {}
    for text in profiles:
        name, sign, ends = text.partition("=")
        reaches[name] = None
        if sign:
            try:
                low, high = map(float, ends.split(":"))
            except ValueError:
                low, high = 1.0, 0.0
            if not 0 < low < high < math.inf:
                raise ConfigError(f"--profile {text} is not valid: give NAME=LOW:HIGH.")
            reaches[name] = Interval(low, high)
    return reaches
