"""The command that fits a law to a table of runs: what is asked, done, printed and written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_mdm.config.parameters import CONVENTIONS, ParameterConvention, in_words
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.statistics import CONFIDENCE, Interval
from megatron_mdm.studies.laws import plots
from megatron_mdm.studies.laws.fitting import Fit, fit_law, objective, r_squared
from megatron_mdm.studies.laws.forms import FORMS, Law
from megatron_mdm.studies.laws.isoflop import IsoFlopAnalysis, analyze_isoflops
from megatron_mdm.studies.laws.power_law import PowerLaw
from megatron_mdm.studies.laws.profile import Profile, profile
from megatron_mdm.studies.laws.runs import Runs, RunsTable, read_runs
from megatron_mdm.studies.laws.storage import LawFile, ranges_of, write_law
from megatron_mdm.studies.laws.uncertainty import bootstrap, constant_interval

# Tables round their numbers: a run repeats its data from here on.
_REPEATS = 1.01


@dataclass(frozen=True)
class FitRequest:
    """What the command line asks for.

    Attributes:
        table: CSV or Parquet of runs.
        form: A form of `FORMS`; None for an isoFLOP analysis alone.
        fit: Constants to fit, comma-separated; None for all that are not held.
        hold: `NAME=VALUE`, constants that are held.
        column: `QUANTITY=COLUMN`, columns with other names.
        tie_exponents: Fit alpha = beta.
        num_resamples: Of the bootstrap; 0 for none.
        seed: Of the bootstrap.
        profiles: `NAME` or `NAME=LOW:HIGH`, constants to profile, and where.
        isoflop: Whether to analyze isoFLOP groups.
        objective: Which runs, and what the law file says.
        skip_failed: Leave out runs without a usable loss.
        parameters: Which N the column of sizes holds, or which of a sweep's two to take.
        out: Folder for the law file and plots; None writes nothing.
    """

    table: Path
    form: str | None
    fit: str | None = None
    hold: Sequence[str] = ()
    column: Sequence[str] = ()
    tie_exponents: bool = False
    num_resamples: int = 0
    seed: int = 0
    profiles: Sequence[str] = ()
    isoflop: bool = False
    objective: Literal["mdm", "ar"] | None = None
    skip_failed: bool = False
    parameters: ParameterConvention | None = None
    out: Path | None = None


@dataclass
class _Done:
    """What was found so far."""

    request: FitRequest
    table: RunsTable
    lines: list[str] = field(default_factory=list)


def fit_and_report(request: FitRequest) -> list[str]:
    """Fits, writes what was asked for, and describes it.

    Args:
        request: What is asked.

    Returns:
        Lines to print.

    Raises:
        MdmError: The request or the runs are not valid.
    """
    form, held = _checked(request)
    columns = _named("--column", request.column)
    table = read_runs(
        request.table,
        columns=columns,
        objective=request.objective,
        skip_failed=request.skip_failed,
        parameters=request.parameters,
    )
    done = _Done(request, table, _table_lines(request.table, table))
    if form is not None:
        _fit(done, form, held)
    if request.isoflop:
        analysis = analyze_isoflops(table.runs)
        done.lines += ["", *isoflop_lines(analysis)]
        if request.out is not None:
            request.out.mkdir(parents=True, exist_ok=True)
            plots.plot_isoflops(request.out / "isoflops.png", analysis, table.parameters)
    if request.out is not None:
        done.lines += ["", f"written to {request.out}"]
    return done.lines


def _fit(done: _Done, form: type[Law], held: Mapping[str, float]) -> None:
    request, runs = done.request, done.table.runs
    fit = fit_law(runs, form, held=held, tie_exponents=request.tie_exponents)
    reaches = _profile_reaches(request.profiles)
    for name in reaches:
        if name not in fit.fitted:
            raise ConfigError(
                f"--profile {name} needs a fit of it: the fitted constants are "
                f"{', '.join(fit.fitted)}."
            )
    laws = (
        bootstrap(runs, fit, request.num_resamples, request.seed) if request.num_resamples else []
    )
    done.lines += ["", *fit_lines(fit, runs, laws)]
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        # The law first: it stays though a plot or profile should fail.
        _write(request.out, done, fit, laws)
        if done.table.parameters is None:
            done.lines.append(
                "  the law file does not say which N it takes, and the planner will not take it: "
                f"give --parameters {' or '.join(CONVENTIONS)}"
            )
        plots.plot_predictions(request.out / "predictions.png", fit.law, runs)
        counted = done.table.parameters
        plots.plot_compute(request.out / "compute.png", fit.law, runs, laws, parameters=counted)
        if fit.law.reuse_names:
            plots.plot_effective_data(request.out / "effective_data.png", fit.law, runs, laws)
    for name, reach in reaches.items():
        found = profile(runs, fit, name, reach)
        done.lines += profile_lines(found)
        if request.out is not None:
            plots.plot_profile(request.out / f"profile_{name}.png", found)


def _write(folder: Path, done: _Done, fit: Fit, laws: Sequence[Law]) -> None:
    runs = done.table.runs
    content = LawFile(
        law=fit.law,
        parameters=done.table.parameters,
        objective=done.request.objective,
        fitted=fit.fitted,
        huber_objective=fit.objective,
        num_runs=len(runs),
        ranges=ranges_of(runs),
        bootstrap=tuple(laws),
        source=f"fitted to {done.request.table.name}",
    )
    write_law(folder / "law.json", content)


def fit_lines(fit: Fit, runs: Runs, laws: Sequence[Law]) -> list[str]:
    """Describes a fit.

    Args:
        fit: The fit.
        runs: What was fitted.
        laws: Resamples; none for no intervals.

    Returns:
        Lines to print.
    """
    form = fit.law.form
    lines = [
        f"{form}, {len(fit.coordinates.free)} constants from {fit.num_starts:,} starts: "
        f"objective {fit.objective:.7f}, R^2 of log loss {r_squared(fit.law, runs):.4f}"
    ]
    title = f"{CONFIDENCE:.0%} of {len(laws)} resamples" if laws else ""
    lines.append(f"  {'constant':<20} {'':<7} {'value':>12}   {title}".rstrip())
    for name in fit.law.names():
        value = getattr(fit.law, name)
        if name not in fit.fitted:
            note = "held"
        elif laws:
            note = constant_interval(laws, name).text()
        else:
            note = ""
        lines.append(f"  {name:<20} {plots.SYMBOLS[name]:<7} {value:>12.7g}   {note}".rstrip())
    for name in fit.at_limits:
        lines.append(f"  {name} ran off to where the search ends: these runs do not tell it")
    moving = [name for name in fit.law.reuse_names if name in fit.fitted]
    for law in fit.others:
        values = ", ".join(f"{name} {getattr(law, name):.5g}" for name in moving or fit.fitted)
        lines.append(f"  another minimum: objective {objective(law, runs):.7f} at {values}")
    num_repeating = int((runs.epochs > _REPEATS).sum())
    if not fit.law.reuse_names and num_repeating:
        lines.append(
            f"  {num_repeating} runs repeat data, which this form counts as new: use another form"
        )
    return lines


def profile_lines(found: Profile) -> list[str]:
    """Describes a profile.

    Args:
        found: The profile.

    Returns:
        Lines to print.
    """
    lines = [
        f"  profile of {found.name}: {found.interval.text()} (likelihood ratio, "
        f"{CONFIDENCE:.0%}); lowest objective {found.lowest:.7f}, threshold {found.threshold:.7f}"
    ]
    if found.is_weakly_identified:
        lines.append(
            f"  {found.name} is weakly identified: values that differ more than tenfold fit alike"
        )
    return lines


def isoflop_lines(analysis: IsoFlopAnalysis) -> list[str]:
    """Describes an isoFLOP analysis.

    Args:
        analysis: The analysis.

    Returns:
        Lines to print.
    """
    lines = ["  FLOPs      runs   best N     interval                  best D     loss"]
    for group in analysis.groups:
        spread = group.parameters_interval.text() if group.parameters_interval else "-"
        lines.append(
            f"  {group.flops:<10.3g} {len(group.losses):>4}   {group.best_parameters:<10.4g} "
            f"{spread:<25} {group.best_tokens:<10.4g} {group.best_loss:.4f}"
        )
    for letter, law in (
        ("N", analysis.size_law),
        ("D", analysis.token_law),
        ("L", analysis.loss_law),
    ):
        if law is not None:
            lines.append(f"  {_power_text(letter, law)}")
    return lines + [f"  warning: {sentence}" for sentence in analysis.warnings()]


def _power_text(letter: str, law: PowerLaw) -> str:
    interval = law.exponent_interval
    spread = f" ({interval.low:.4g} to {interval.high:.4g})" if interval is not None else ""
    return f"best {letter} = {law.scale:.4g} C^{law.exponent:.4f}{spread}"


def _table_lines(path: Path, table: RunsTable) -> list[str]:
    ranges = ranges_of(table.runs)
    spans = ", ".join(
        f"{letter} {ranges[name][0]:.3g} to {ranges[name][1]:.3g}"
        for letter, name in (
            ("N", "num_parameters"),
            ("D", "num_tokens"),
            ("U", "unique_tokens"),
            ("epochs", "epochs"),
        )
    )
    counted = "" if table.parameters is None else f"; N {in_words(table.parameters)}"
    lines = [f"{len(table.runs)} runs of {path}: {spans}{counted}"]
    if table.left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in table.left_out.items())
        lines.append(f"left out: {reasons}")
    return lines


def _checked(request: FitRequest) -> tuple[type[Law] | None, dict[str, float]]:
    """The form and the held constants, before anything is read."""
    if request.out is not None and request.out.exists() and not request.out.is_dir():
        raise ConfigError(f"--out {request.out} is a file: name a folder.")
    if request.form is None:
        if not request.isoflop:
            raise ConfigError(
                f"Nothing is asked for: give --form ({', '.join(FORMS)}) or --isoflop."
            )
        return None, {}
    if request.form not in FORMS:
        raise ConfigError(f"--form {request.form} is not known: use {', '.join(FORMS)}.")
    form = FORMS[request.form]
    if request.num_resamples < 0:
        raise ConfigError(f"--bootstrap {request.num_resamples} is not valid: give 0 or more.")
    held = {}
    for name, text in _named("--hold", request.hold).items():
        try:
            held[name] = float(text)
        except ValueError:
            raise ConfigError(f"--hold {name}={text} is not valid: give a number.") from None
    asked = request.fit.split(",") if request.fit is not None else []
    for name in (*held, *asked, *_profile_reaches(request.profiles)):
        if name not in form.names():
            raise ConfigError(
                f"{name} is no constant of the form {form.form}: use {', '.join(form.names())}."
            )
    if request.fit is not None:
        for name in form.names():
            if (name in asked) == (name in held):
                state = "both fitted and held" if name in held else "neither fitted nor held"
                raise ConfigError(f"{name} is {state}: name it in --fit, or give --hold {name}=X.")
    return form, held


def _named(option: str, pairs: Sequence[str]) -> dict[str, str]:
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
