"""Runs side by side: one HTML page with their curves on common axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from megatron_mdm.core.errors import DataError
from megatron_mdm.reporting import curves
from megatron_mdm.reporting.baselines import EXPLANATION, find_common
from megatron_mdm.reporting.console import format_count
from megatron_mdm.reporting.curves import Axis, RunCurve
from megatron_mdm.reporting.judged_windows import JudgedWindows, paired_difference
from megatron_mdm.reporting.metrics import MATCHED_NLL, NLL
from megatron_mdm.reporting.pages import Plot, write_page
from megatron_mdm.reporting.run_folder import (
    RunFolder,
    flatten,
    format_scientific,
    format_setting,
    open_run,
)

# Two losses are comparable only if these settings agree.
_JUDGED_BY = (
    "data.valid",
    "data.seq_length",
    "model.vocab_size",
    "validation.num_samples",
    "validation.noise_seed",
)
_PLACES = ("run.dir", "run.device", "data.tokenizer")
_TITLES: dict[Axis, str] = {
    "epoch": "Loss against epochs",
    "consumed_tokens": "Loss against tokens",
    "consumed_flops_6nd": "Loss against compute",
}


def write_comparison(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Writes a page with the curves of several runs, such as an AR run and its MDM twin.

    Args:
        run_dirs: Directories of at least two runs, each validated at least once.
        output: Page to write; None writes `comparison.html` beside the first run.

    Returns:
        The path of the page.

    Raises:
        DataError: A directory is missing, a file is damaged, or a run has no validation.
    """
    runs = [open_run(run_dir) for run_dir in run_dirs]
    for run in runs:
        if not run.validations:
            raise DataError(
                f"{run.path} has no held-out loss to compare: leave it out, or wait for its first "
                "validation."
            )
    labels = _choose_labels(runs)
    return write_page(
        "comparison.html.j2",
        output or run_dirs[0].resolve().parent / "comparison.html",
        labels=labels,
        rows=[_build_row(label, run) for label, run in zip(labels, runs, strict=True)],
        plots=build_plots(labels, runs),
        paired=_list_paired_rows(labels, runs),
        is_mixed=len({run.objective.nll_is_exact for run in runs}) > 1,
        unmatched=[
            label
            for label, run in zip(labels, runs, strict=True)
            if not run.objective.nll_is_exact and _is_old(run)
        ],
        incomparable=[name for name in _find_differing(runs) if name in _JUDGED_BY],
        differences=[
            (name, [format_setting(value) for value in values])
            for name, values in _find_differing(runs).items()
        ],
    )


def _is_old(run: RunFolder) -> bool:
    return any(NLL in record and MATCHED_NLL not in record for record in run.records)


def _list_paired_rows(labels: Sequence[str], runs: Sequence[RunFolder]) -> list[list[str]]:
    """Differences of each run from the first, where both judged the same windows."""
    judged = [
        [
            None if record is None else run.windows.get(record["step"])
            for record in (run.last_validation, run.best_validation)
        ]
        for run in runs
    ]
    rows = []
    for label, windows in zip(labels[1:], judged[1:], strict=True):
        cells = [
            cell
            for first, other in zip(judged[0], windows, strict=True)
            for cell in _format_difference(first, other)
        ]
        if any(cells):
            rows.append([label, labels[0], *cells])
    return rows


def _format_difference(first: JudgedWindows | None, other: JudgedWindows | None) -> list[str]:
    found = None if first is None or other is None else paired_difference(first, other)
    if found is None:
        return ["", ""]
    error, clustered = found.standard_error, found.clustered_error
    return [
        f"{found.mean:+.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else ""),
        f"± {clustered:.4f}" if math.isfinite(clustered) else "",
    ]


def _choose_labels(runs: Sequence[RunFolder]) -> list[str]:
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else str(run.path)
        for name, run in zip(names, runs, strict=True)
    ]


def _build_row(label: str, run: RunFolder) -> list[str]:
    last, best = run.last_validation, run.best_validation
    parameters = run.run_info.get("parameters_without_embeddings")
    total = run.run_info.get("parameters_with_embeddings")
    flops = last.get("consumed_flops_6nd")
    counts = [number for number in (parameters, total) if number is not None]
    spent = [] if flops is None else [flops]
    if flops is not None and parameters is not None and total is not None:
        spent.append(flops * total / parameters)
    return [
        label,
        run.objective_name,
        " / ".join(map(format_count, counts)),
        format_count(last["consumed_tokens"]) if "consumed_tokens" in last else "",
        f"{last['epoch']:.2f}" if "epoch" in last else "",
        " / ".join(map(format_scientific, spent)),
        _format_with_error(last, "valid/nll"),
        "" if best is None else _format_with_error(best, "valid/nll"),
        f"{best['epoch']:.2f}" if best is not None and "epoch" in best else "",
        _format_with_error(last, "valid/gap"),
    ]


def _format_with_error(record: Any, name: str) -> str:
    if f"{name}_nats_per_token" not in record:
        return ""
    text = f"{record[f'{name}_nats_per_token']:.4f}"
    error = record.get(f"{name}_standard_error")
    return text if error is None else f"{text} ± {error:.4f}"


def build_plots(labels: Sequence[str], runs: Sequence[RunFolder]) -> list[Plot]:
    """Draws runs on common axes.

    Args:
        labels: Names in the legend.
        runs: The runs, each validated at least once.

    Returns:
        Losses against epochs, tokens and compute, as far as these are known and differ.
    """
    drawn = [
        RunCurve(label, run.matched, run.objective_kind)
        for label, run in zip(labels, runs, strict=True)
    ]
    caption = (
        "Solid: held-out windows, with a band of one standard error to each side; ring: the "
        "lowest. Dashed: training windows, judged in the same way."
    )
    baselines = find_common([run.baselines for run in runs])
    if baselines is not None:
        caption += f" {EXPLANATION}"
    built = []
    for axis, title in _TITLES.items():
        known = [curve for curve in drawn if any(axis in record for record in curve.records)]
        if not known or (axis == "consumed_tokens" and _share_epochs(drawn)):
            continue
        missing = [curve.label for curve in drawn if curve not in known]
        without = f" Not logged by {', '.join(missing)}." if missing else ""
        svg = curves.plot_comparison(known, axis, baselines=baselines)
        built.append(Plot(Markup(svg), title, caption + without))
    return built


def _share_epochs(drawn: Sequence[RunCurve]) -> bool:
    """Tells whether an epoch is as many tokens in all runs: then tokens show nothing new."""
    sizes = []
    for curve in drawn:
        with np.errstate(invalid="ignore", divide="ignore"):
            tokens = curves.extract_column(curve.records, "consumed_tokens")
            sizes.append(np.nanmedian(tokens / curves.extract_column(curve.records, "epoch")))
    return bool(np.allclose(sizes, sizes[0], rtol=1e-9, atol=0))


def _find_differing(runs: Sequence[RunFolder]) -> dict[str, list[Any]]:
    """Gives the settings that are not the same in all runs, with their values."""
    flat = [dict(flatten(run.config)) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    values = {name: [settings.get(name) for settings in flat] for name in names}
    return {
        name: found
        for name, found in values.items()
        if name not in _PLACES and any(value != found[0] for value in found)
    }
