"""Curves of tasks that a run evaluated while it trained, as the hook `downstream` logs them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib import colors

from megatron_mdm.reporting.figures import open_figure, render_svg

Records = Sequence[Mapping[str, Any]]

# Group of their metrics, as in `downstream/piqa/acc`; of an average of the weights it has its name
# behind it, as in `downstream_ema/piqa/acc`.
TASKS = "downstream"
_GROUP = re.compile(rf"{TASKS}(_\w+)?/")
_ERROR, _NOISE = "_standard_error", "_noise"
_MARKERS = "os^Dv"


def list_task_metrics(records: Records) -> list[str]:
    """Lists the figures of tasks in the records of a run, each once, without their errors."""
    names = dict.fromkeys(name for record in records for name in record)
    return [name for name in names if _GROUP.match(name) and not name.endswith((_ERROR, _NOISE))]


def plot_tasks(records: Records) -> dict[str, str]:
    """Plots the figures of tasks against steps, those of one metric in one plot.

    Args:
        records: Records of a run.

    Returns:
        For each metric, such as acc, the SVG element; bars are one standard error to each side.
    """
    by_metric: dict[str, list[str]] = {}
    for name in list_task_metrics(records):
        by_metric.setdefault(name.rpartition("/")[2], []).append(name)
    return {metric: _plot(records, metric, names) for metric, names in by_metric.items()}


def build_task_table(records: Records) -> dict[str, list[Any]]:
    """Builds the table of all evaluations: heads of the columns, and rows."""
    names = list_task_metrics(records)
    titles = [title_task_metric(name) for name in names]
    rows = [
        [f"{record['step']:,}", *(format_task_metric(record, name) for name in names)]
        for record in records
        if any(name in record for name in names)
    ]
    return {"columns": ["Step", *titles], "rows": rows}


def _plot(records: Records, metric: str, names: Sequence[str]) -> str:
    shades = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]
    with open_figure(8.2, 2.9) as (figure, (axes,)):
        for number, name in enumerate(names):
            found = [one for one in records if math.isfinite(float(one.get(name, math.nan)))]
            axes.errorbar(
                [one["step"] for one in found],
                [float(one[name]) for one in found],
                yerr=[float(one.get(name + _ERROR, 0.0)) for one in found],
                color=colors.to_hex(shades[number % len(shades)]),
                marker=_MARKERS[number // len(shades) % len(_MARKERS)],
                label=title_task_metric(name.rpartition("/")[0]),
                ms=4,
                lw=1.4,
                elinewidth=1.2,
                capsize=2.5,
            )
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(metric.replace("_", " "))
        axes.legend(loc="best")
        return render_svg(figure, f"tasks-{metric}")


def title_task_metric(name: str) -> str:
    """Titles a figure: the task, the metric, and which average of the weights if it is of one."""
    group, _, rest = name.partition("/")
    average = group.removeprefix(TASKS).removeprefix("_")
    return rest.replace("/", " ") + (f" ({average})" if average else "")


def format_task_metric(record: Mapping[str, Any], name: str) -> str:
    """Formats a figure with its standard error, if it has one; empty where it is not there."""
    if name not in record:
        return ""
    text = f"{float(record[name]):.4g}"
    return f"{text} ± {float(record[name + _ERROR]):.2g}" if name + _ERROR in record else text
