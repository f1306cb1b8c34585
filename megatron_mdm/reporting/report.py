"""The report of a run: one HTML page that needs nothing but itself."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from megatron_mdm.config.objective import find_recorded_remark
from megatron_mdm.core.errors import DataError
from megatron_mdm.reporting import curves, plots
from megatron_mdm.reporting.baselines import EXPLANATION
from megatron_mdm.reporting.console import format_count, format_duration
from megatron_mdm.reporting.ledger_rows import build_ledger_rows
from megatron_mdm.reporting.metrics import (
    GAP,
    MATCHED_NLL,
    NLL,
    TRAIN_NLL,
    find_best_validation,
    list_averages,
    list_judges,
    name_average_group,
)
from megatron_mdm.reporting.pages import Plot, write_page
from megatron_mdm.reporting.run_folder import (
    RunFolder,
    find_last_with,
    flatten,
    format_scientific,
    format_setting,
    open_run,
)
from megatron_mdm.reporting.task_curves import build_task_table, plot_tasks

_SAMPLE_KINDS = ("infill", "prompt")
_SCIENTIFIC_FROM = 10**15


@dataclass(frozen=True)
class Headline:
    """One figure at the top of the page.

    Args:
        label: What the figure is.
        value: The figure, without its unit.
        unit: Unit, or empty.
        note: A few words on how the figure arises, or empty.
    """

    label: str
    value: str
    unit: str = ""
    note: str = ""


def write_report(
    run_dir: Path, output: Path | None = None, *, samples_path: Path | None = None
) -> Path:
    """Writes the report of a run as a self-contained HTML page.

    Args:
        run_dir: Directory of the run. `metrics.jsonl`, `config.yaml`, `ledger.json` and
            `run_info.json` are read from it; each may be missing, and the page then says so.
        output: Page to write; None writes `<run_dir>/report.html`.
        samples_path: JSON list of samples, each with `kind` ("infill" or "prompt"), `prompt`,
            `completions`, and optionally `suffix` and `settings`; None shows no samples.

    Returns:
        The path of the page.

    Raises:
        DataError: The run directory or the samples file is missing, or a file is damaged.
    """
    run = open_run(run_dir)
    return write_page(
        "report.html.j2",
        output or run_dir / "report.html",
        run_name=run.name,
        trains=run.objective.trains,
        remark=find_recorded_remark(run.config),
        nll_is_exact=run.objective.nll_is_exact,
        headlines=_build_headlines(run),
        plots=_build_plots(run),
        validations=_build_validation_table(run),
        tasks=build_task_table(run.records),
        task_plots=_build_task_plots(run),
        samples=[] if samples_path is None else _read_samples(samples_path),
        facts=[(_label(name), _format_fact(name, value)) for name, value in flatten(run.run_info)],
        ledger=build_ledger_rows(run.ledger),
        sections=_build_sections(run.config),
    )


def _build_headlines(run: RunFolder) -> list[Headline]:
    headlines: list[Headline] = []
    records = run.records
    valid = find_last_with(records, NLL)
    train = find_last_with(records, "train/loss_nats_per_token")
    if valid is not None:
        headlines += _build_validation_headlines(valid, run)
    elif train is not None:
        loss = f"{train['train/loss_nats_per_token']:.3f}"
        note = f"last batch, step {train['step']:,}"
        headlines.append(Headline("Training loss", loss, "nats/token", note))
    tokens = find_last_with(records, "consumed_tokens")
    if tokens is not None:
        note = f"{tokens['consumed_tokens']:,} by step {tokens['step']:,}"
        headlines.append(Headline("Tokens seen", format_count(tokens["consumed_tokens"]), "", note))
    epochs = find_last_with(records, "epoch")
    if epochs is not None:
        note = "over the training set"
        headlines.append(Headline("Epochs", f"{epochs['epoch']:.2f}", "", note))
    if "wall_seconds" in run.run_info:
        seconds = float(run.run_info["wall_seconds"])
        note = f"{seconds:,.0f} seconds"
        headlines.append(Headline("Wall time", format_duration(seconds), "", note))
    return headlines


def _build_validation_headlines(record: Mapping[str, Any], run: RunFolder) -> list[Headline]:
    nll = float(record[NLL])
    error = record.get("valid/nll_standard_error")
    value, interval = f"{nll:.3f}", "exp(NLL)"
    if error is not None:
        value += f" ± {error:.3f}"
        low, high = _format_perplexity(nll - error), _format_perplexity(nll + error)
        interval = f"{low} to {high} at ± 1 s.e."
    note = f"{'' if run.objective.nll_is_exact else 'upper bound, '}step {record['step']:,}"
    best = find_best_validation(run.records)
    if "valid/nll_clustered_error" in record:
        note += f"; ± {record['valid/nll_clustered_error']:.3f} by document"
    if best is not None and best["step"] != record["step"]:
        note += f"; best {best[NLL]:.3f} at step {best['step']:,}"
    label, sign = ("Perplexity", "") if run.objective.nll_is_exact else ("Perplexity bound", "≤ ")
    return [
        Headline("Validation NLL", value, "nats/token", note),
        Headline(label, f"{sign}{_format_perplexity(nll)}", "", interval),
    ]


def _format_perplexity(nll_nats_per_token: float) -> str:
    try:
        perplexity = math.exp(nll_nats_per_token)
    except OverflowError:
        perplexity = math.inf
    return f"{perplexity:,.1f}" if perplexity < 1e6 else f"{perplexity:.3g}"


def _build_plots(run: RunFolder) -> list[Plot]:
    built: list[Plot] = []
    records, kind = run.records, run.objective_kind
    loss = plots.extract_series(records, "train/loss_nats_per_token")
    nll = plots.extract_series(records, NLL)
    if len(loss) or len(nll):
        size = run.run_info.get("vocab_size")
        svg = plots.plot_loss(records, kind, vocab_size=size, baselines=run.baselines)
        caption = _describe_losses(run, loss, nll)
        counted = "" if run.baselines is None else f" {EXPLANATION}"
        built.append(Plot(Markup(svg), "Loss", caption + counted))
    if curves.has_epoch_curve(records):
        svg = curves.plot_epochs(records, kind, run.baselines)
        built.append(Plot(Markup(svg), "Loss against epochs", _describe_epochs(records)))
    others: list[tuple[str, str, str, str, dict[str, bool]]] = [
        ("train/lr", "Learning rate", "learning rate", "Rate applied at each logged step.", {}),
        (
            "train/grad_norm",
            "Gradient norm",
            "gradient norm (L2)",
            f"Global norm before clipping. {_describe_curves(len(loss))}",
            {"smoothed": True},
        ),
        (
            "perf/tokens_per_second",
            "Throughput",
            "tokens per second",
            f"All devices together. {_describe_curves(len(loss))}",
            {"smoothed": True, "engineering": True},
        ),
    ]
    for name, title, label, caption, options in others:
        if len(plots.extract_series(records, name)):
            svg = plots.plot_metric(records, name, kind, label=label, **options)
            built.append(Plot(Markup(svg), title, caption))
    return built


def _build_task_plots(run: RunFolder) -> list[Plot]:
    caption = "Bars: one standard error to each side, over documents and, of MDM, masks."
    return [
        Plot(Markup(svg), f"Tasks: {metric.replace('_', ' ')}", caption)
        for metric, svg in plot_tasks(run.records).items()
    ]


def _describe_losses(run: RunFolder, loss: plots.Series, nll: plots.Series) -> str:
    parts = []
    if len(loss):
        parts.append(_describe_curves(len(loss), "dotted"))
    if len(nll):
        exact = run.objective.nll_is_exact
        what = "negative log-likelihood" if exact else "negative log-likelihood bound"
        noise = "" if exact else " and the same noise"
        parts.append(f"Points: {what} of held-out windows, the same{noise} each time.")
        if find_last_with(run.records, TRAIN_NLL) is not None:
            parts.append(
                "Squares: of training windows, judged in the same way. Their distance is the gap; "
                "the distance to the training loss is not, since each batch is other text"
                f"{'' if exact else ' with other noise'}."
            )
    else:
        parts.append("This run has no validation yet.")
    num_non_finite = loss.num_non_finite + nll.num_non_finite
    if num_non_finite:
        parts.append(f"{num_non_finite} non-finite values are not drawn.")
    return " ".join(parts)


def _describe_epochs(records: Sequence[Mapping[str, Any]]) -> str:
    parts = ["Bands: one standard error to each side. Ring: the lowest held-out loss."]
    if find_last_with(records, TRAIN_NLL) is not None:
        parts.append("Training windows are judged as held-out ones are, without dropout.")
    if find_last_with(records, GAP) is not None:
        parts.append("Gap: held-out less training windows.")
    return " ".join(parts)


def _describe_curves(num_points: int, mean: str = "bold") -> str:
    return (
        f"Faint: logged values, of which the most extreme may lie off the axis; {mean}: centred "
        f"triangular mean over {plots.choose_smoothing_window(num_points)} of them."
    )


def _build_validation_table(run: RunFolder) -> dict[str, list[Any]]:
    """Gives the heads of the columns and the rows; columns without a value are left out."""
    bound = "" if run.objective.nll_is_exact else " bound"
    columns = ["Step", "Epoch", f"NLL{bound}, nats/token", "Standard error", "By document"]
    columns += [f"Perplexity{bound}", "Given first", "Change", "Training windows", "Gap", "Tokens"]
    judged = [record for record in run.records if NLL in record]
    averages = list(dict.fromkeys(name for record in judged for name in list_averages(record)))
    columns += [f"Average {name} (less raw)" for name in averages]
    judges = list_judges(judged)
    columns += [f"NLL as {judge.upper()}" for judge in judges]
    rows = [_build_validation_row(record, averages, judges) for record in judged]
    used = [any(cells) for cells in zip(*rows, strict=True)]
    return {
        "columns": [name for name, is_used in zip(columns, used, strict=False) if is_used],
        "rows": [
            [cell for cell, is_used in zip(row, used, strict=True) if is_used] for row in rows
        ],
    }


def _build_validation_row(
    record: Mapping[str, Any], averages: Sequence[str], judges: Sequence[str]
) -> list[str]:
    def show(name: str, form: str) -> str:
        return format(record[name], form) if name in record else ""

    def show_with_error(name: str, form: str = ".4f") -> str:
        value = show(f"{name}_nats_per_token", form)
        error = show(f"{name}_standard_error", ".4f")
        return f"{value} ± {error}" if value and error else value

    def show_average(name: str) -> str:
        group = name_average_group(name)
        less = show_with_error(f"{group}/less_raw", "+.4f")
        return f"{show_with_error(f'{group}/nll')} ({less})" if less else ""

    is_matched_apart = record.get(MATCHED_NLL, record[NLL]) != record[NLL]
    change = show_with_error("valid/change", "+.4f")
    if change:
        change += f" since {record['valid/change_since_step']:,}"
    return [
        f"{record['step']:,}",
        show("epoch", ".2f"),
        show(NLL, ".4f"),
        show("valid/nll_standard_error", ".4f"),
        show("valid/nll_clustered_error", ".4f"),
        _format_perplexity(float(record[NLL])),
        show_with_error("valid/nll_given_first") if is_matched_apart else "",
        change,
        show_with_error("train/nll"),
        show_with_error("valid/gap"),
        show("valid/num_tokens", ","),
        *map(show_average, averages),
        *(show_with_error(f"valid/as_{judge}_nll") for judge in judges),
    ]


def _build_sections(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Gives one table per section; settings outside of sections come first."""
    general = {name: value for name, value in config.items() if not isinstance(value, dict)}
    sections = {"general": general} if general else {}
    sections |= {name: value for name, value in config.items() if isinstance(value, dict)}
    return [
        (str(title), [(name, format_setting(value)) for name, value in flatten(section)])
        for title, section in sections.items()
    ]


def _label(name: str) -> str:
    for suffix, replacement in (("_bytes", ""), ("_seconds", "_time")):
        if name.endswith(suffix):
            name = name.removesuffix(suffix) + replacement
    words = name.removeprefix("num_").replace("_", " ").replace(".", ": ")
    words = words.replace("flops", "FLOPs")
    return words[:1].upper() + words[1:]


def _format_fact(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return format_setting(value)
    if name.endswith("_bytes"):
        return f"{value / 2**30:,.2f} GiB" if value >= 2**29 else f"{value / 2**20:,.1f} MiB"
    if name.endswith("_seconds"):
        return format_duration(value)
    if abs(value) >= _SCIENTIFIC_FROM:
        return format_scientific(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _read_samples(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path} does not exist: give a file of samples or leave the samples out.")
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no valid JSON ({error}): make the samples again.") from error
    if not isinstance(samples, list):
        raise DataError(f"{path} holds {type(samples).__name__}: it must be a list of samples.")
    return [_check_sample(path, number, sample) for number, sample in enumerate(samples, start=1)]


def _check_sample(path: Path, number: int, sample: Any) -> dict[str, Any]:
    where = f"{path} sample {number}"
    if not isinstance(sample, dict):
        raise DataError(f"{where} is {type(sample).__name__}: it must be an object.")
    kind, completions = sample.get("kind"), sample.get("completions")
    settings = sample.get("settings") or {}
    if kind not in _SAMPLE_KINDS:
        raise DataError(f"{where} has kind={kind!r}: use one of {', '.join(_SAMPLE_KINDS)}.")
    if not isinstance(completions, list) or not all(isinstance(text, str) for text in completions):
        raise DataError(f"{where} has completions={completions!r}: it must be a list of texts.")
    if not isinstance(settings, dict):
        raise DataError(f"{where} has settings={settings!r}: it must be an object.")
    return {
        "kind": kind,
        "prompt": sample.get("prompt") or "",
        "suffix": sample.get("suffix") or "",
        "completions": completions,
        "settings": [(name, format_setting(value)) for name, value in settings.items()],
    }
