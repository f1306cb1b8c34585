"""The command that fits a law to a table of runs: what is asked, done, printed and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mdm.config.parameters import CONVENTIONS, describe_convention
from megatron_mdm.core.errors import DataError
from megatron_mdm.studies.laws import epoch_plots, plots, trees, words
from megatron_mdm.studies.laws.best_epochs import analyze_best_epochs, places_of
from megatron_mdm.studies.laws.comparison import compare_forms
from megatron_mdm.studies.laws.epoch_curves import (
    find_minima,
    gather_table_curves,
    read_folder_curves,
)
from megatron_mdm.studies.laws.epochs_law import fit_epochs_law
from megatron_mdm.studies.laws.fitting import Fit, fit_law
from megatron_mdm.studies.laws.forms import Law
from megatron_mdm.studies.laws.isoflop import analyze_isoflops
from megatron_mdm.studies.laws.request import FitSettings, Request, check_request, read_pairs
from megatron_mdm.studies.laws.runs import RunsTable, read_runs
from megatron_mdm.studies.laws.storage import LawFile, find_ranges, write_law
from megatron_mdm.studies.laws.uncertainty import bootstrap, profile


class Report(NamedTuple):
    """What was found.

    Attributes:
        lines: For people.
        tree: For programs.
    """

    lines: list[str]
    tree: dict[str, Any]


def fit_and_report(table: Path, settings: FitSettings) -> list[str]:
    """Fits, writes what was asked for, and describes it in lines, as `analyze_table` does."""
    return analyze_table(table, settings).lines


def analyze_table(table: Path, settings: FitSettings) -> Report:
    """Fits, writes what was asked for, and describes it.

    Args:
        table: CSV or Parquet, a row a run.
        settings: What is asked.

    Returns:
        Lines to print, and the same as a tree.

    Raises:
        MdmError: The settings or the runs are not valid.
    """
    asked = check_request(settings)
    found = read_runs(
        table,
        columns=read_pairs("--column", settings.column),
        objective=settings.objective,
        skip_failed=settings.skip_failed,
        parameters=settings.parameters,
    )
    report = Report(_table_lines(table, found), {"table": trees.tree_of_table(found)})
    if settings.out is not None:
        settings.out.mkdir(parents=True, exist_ok=True)
    if asked.form is not None:
        report = _fit(report, asked, settings, table.name, found)
    if asked.compared:
        report = _compare(report, asked, settings, found)
    if settings.curves:
        report = _read_curves(report, settings, found)
    if settings.isoflop:
        report = _analyze_isoflops(report, settings, found)
    if settings.out is not None:
        report.lines.extend(["", f"written to {settings.out}"])
    return report


def _fit(
    report: Report, asked: Request, settings: FitSettings, name: str, table: RunsTable
) -> Report:
    runs, form = table.runs, asked.form
    assert form is not None
    fit = fit_law(runs, form, held=asked.held, tie_exponents=settings.tie_exponents)
    laws = bootstrap(runs, fit, settings.bootstrap, settings.seed)
    lines = words.format_fit(fit, runs, laws)
    tree: dict[str, Any] = {"fit": trees.tree_of_fit(fit, runs, laws)}
    if settings.out is not None:
        lines += _write_fit(settings, settings.out, name, fit, laws, table)
    profiles = []
    for constant, reach in asked.profiles.items():
        found = profile(runs, fit, constant, reach)
        profiles.append(trees.tree_of_profile(found))
        lines += words.format_profile(found)
        if settings.out is not None:
            place, symbol = settings.out / f"profile_{constant}.png", form.constants()[constant]
            plots.plot_profile(place, found, symbol.symbol, objective=table.objective)
    if profiles:
        tree["profiles"] = profiles
    if form.penalty_names:
        more = _find_best_epochs(asked, settings, fit, laws, table)
        lines, tree = [*lines, *more.lines], tree | more.tree
    return Report([*report.lines, "", *lines], report.tree | tree)


def _write_fit(
    settings: FitSettings, out: Path, name: str, fit: Fit, laws: Sequence[Law], table: RunsTable
) -> list[str]:
    """Writes the law file and its plots; gives what is to be said of them."""
    runs, lines = table.runs, []
    of: Any = {"objective": table.objective}
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
    plots.plot_compute(out / "compute.png", fit.law, runs, laws, **of, parameters=table.parameters)
    if fit.law.reuse_names:
        plots.plot_effective_data(out / "effective_data.png", fit.law, runs, laws, **of)
    return lines


def _find_best_epochs(
    asked: Request, settings: FitSettings, fit: Fit, laws: Sequence[Law], table: RunsTable
) -> Report:
    found = analyze_best_epochs(fit, table.runs, laws, places_of(table.runs), asked.places)
    if settings.out is not None:
        of: Any = {"objective": table.objective}
        epoch_plots.plot_epochs(settings.out / "epochs.png", fit.law, table.runs, found, **of)
        for number, point in enumerate(one for one in found.points if one.profile is not None):
            assert point.profile is not None
            place = settings.out / f"profile_best_epochs_{number}.png"
            of_what = f"E* of N={point.num_parameters:.3g}, U={point.unique_tokens:.3g}"
            plots.plot_profile(place, point.profile, of_what, **of)
    lines = words.format_epochs(found, len(laws))
    return Report(["", *lines], {"best_epochs": trees.tree_of_epochs(found)})


def _compare(report: Report, asked: Request, settings: FitSettings, table: RunsTable) -> Report:
    found = compare_forms(
        table.runs,
        asked.compared,
        settings.held_out,
        held=asked.held,
        tie_exponents=settings.tie_exponents,
    )
    tree = {"comparison": trees.tree_of_comparison(found, table.names)}
    return Report([*report.lines, "", *words.format_comparison(found)], report.tree | tree)


def _read_curves(report: Report, settings: FitSettings, table: RunsTable) -> Report:
    if settings.folders is None:
        curves = gather_table_curves(table)
    else:
        curves = read_folder_curves(table, settings.folders)
    minima = find_minima(curves)
    law, reason = None, ""
    try:
        law = fit_epochs_law(minima)
    except DataError as error:
        # The minima stand by themselves.
        reason = str(error)
    if settings.out is not None:
        place = settings.out / "best_epochs.png"
        epoch_plots.plot_curves(place, minima, law, objective=table.objective)
    lines = words.format_curves(minima, law, reason)
    tree = {"curves": trees.tree_of_curves(minima, law, reason)}
    return Report([*report.lines, "", *lines], report.tree | tree)


def _analyze_isoflops(report: Report, settings: FitSettings, table: RunsTable) -> Report:
    analysis = analyze_isoflops(table.runs)
    if settings.out is not None:
        plots.plot_isoflops(
            settings.out / "isoflops.png", analysis, table.parameters, objective=table.objective
        )
    tree = {"isoflops": trees.tree_of_isoflops(analysis)}
    return Report([*report.lines, "", *words.format_isoflops(analysis)], report.tree | tree)


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
