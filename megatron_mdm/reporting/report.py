"""The report of a run: one HTML page that needs nothing but itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_mdm.data.ledger import build_ledger_rows
from megatron_mdm.errors import DataError
from megatron_mdm.reporting import plots
from megatron_mdm.reporting.console import format_count, format_duration
from megatron_mdm.reporting.metrics import METRICS_FILE_NAME, read_metrics

_SAMPLE_KINDS = ("infill", "prompt")
_SCIENTIFIC_FROM = 10**15
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


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


@dataclass(frozen=True)
class Plot:
    """One figure of the page.

    Args:
        svg: The SVG element.
        title: Heading of the figure.
        caption: What is drawn and how.
    """

    svg: Markup
    title: str
    caption: str


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
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is not a directory: give the directory of a run.")
    metrics_path = run_dir / METRICS_FILE_NAME
    records = read_metrics(metrics_path) if metrics_path.exists() else []
    run_info = _read_mapping(run_dir / "run_info.json")
    environment = Environment(
        loader=PackageLoader("megatron_mdm.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        run_name=run_dir.resolve().name,
        headlines=_build_headlines(records, run_info),
        plots=_build_plots(records, run_info),
        validations=_build_validation_rows(records),
        samples=[] if samples_path is None else _read_samples(samples_path),
        facts=[(_label(name), _format_fact(name, value)) for name, value in _flatten(run_info)],
        ledger=build_ledger_rows(_read_mapping(run_dir / "ledger.json")),
        sections=_build_sections(_read_mapping(run_dir / "config.yaml")),
    )
    output = output or run_dir / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(output)
    return output


def _build_headlines(
    records: Sequence[Mapping[str, Any]], run_info: Mapping[str, Any]
) -> list[Headline]:
    headlines: list[Headline] = []
    valid = _last_with(records, "valid/nll_nats_per_token")
    train = _last_with(records, "train/loss_nats_per_token")
    if valid is not None:
        headlines += _build_validation_headlines(valid)
    elif train is not None:
        loss = f"{train['train/loss_nats_per_token']:.3f}"
        note = f"last batch, step {train['step']:,}"
        headlines.append(Headline("Training loss", loss, "nats/token", note))
    tokens = _last_with(records, "consumed_tokens")
    if tokens is not None:
        note = f"{tokens['consumed_tokens']:,} by step {tokens['step']:,}"
        headlines.append(Headline("Tokens seen", format_count(tokens["consumed_tokens"]), "", note))
    epochs = _last_with(records, "epoch")
    if epochs is not None:
        note = "over the training set"
        headlines.append(Headline("Epochs", f"{epochs['epoch']:.2f}", "", note))
    if "wall_seconds" in run_info:
        seconds = float(run_info["wall_seconds"])
        note = f"{seconds:,.0f} seconds"
        headlines.append(Headline("Wall time", format_duration(seconds), "", note))
    return headlines


def _build_validation_headlines(record: Mapping[str, Any]) -> list[Headline]:
    nll = float(record["valid/nll_nats_per_token"])
    error = record.get("valid/nll_standard_error")
    value, interval = f"{nll:.3f}", "exp(NLL)"
    if error is not None:
        value += f" ± {error:.3f}"
        interval = f"{_perplexity(nll - error)} to {_perplexity(nll + error)} at ± 1 s.e."
    note = f"upper bound, step {record['step']:,}"
    return [
        Headline("Validation NLL", value, "nats/token", note),
        Headline("Perplexity bound", f"≤ {_perplexity(nll)}", "", interval),
    ]


def _perplexity(nll_nats_per_token: float) -> str:
    try:
        perplexity = math.exp(nll_nats_per_token)
    except OverflowError:
        perplexity = math.inf
    return f"{perplexity:,.1f}" if perplexity < 1e6 else f"{perplexity:.3g}"


def _build_plots(records: Sequence[Mapping[str, Any]], run_info: Mapping[str, Any]) -> list[Plot]:
    built: list[Plot] = []
    loss = plots.extract_series(records, "train/loss_nats_per_token")
    nll = plots.extract_series(records, "valid/nll_nats_per_token")
    if len(loss) or len(nll):
        svg = plots.plot_loss(records, vocab_size=run_info.get("vocab_size"))
        built.append(Plot(Markup(svg), "Loss", _loss_caption(loss, nll)))
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
            svg = plots.plot_metric(records, name, label=label, **options)
            built.append(Plot(Markup(svg), title, caption))
    return built


def _loss_caption(loss: plots.Series, nll: plots.Series) -> str:
    parts = []
    if len(loss):
        parts.append(_describe_curves(len(loss)))
    if len(nll):
        parts.append("Points: negative log-likelihood bound on the validation set.")
    else:
        parts.append("This run has no validation yet.")
    num_non_finite = loss.num_non_finite + nll.num_non_finite
    if num_non_finite:
        parts.append(f"{num_non_finite} non-finite values are not drawn.")
    return " ".join(parts)


def _describe_curves(num_points: int) -> str:
    return (
        "Faint: logged values, of which the most extreme may lie off the axis; bold: centred "
        f"triangular mean over {plots.smoothing_window(num_points)} of them."
    )


def _build_validation_rows(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for record in records:
        if "valid/nll_nats_per_token" not in record:
            continue
        nll = float(record["valid/nll_nats_per_token"])
        epoch, error = record.get("epoch"), record.get("valid/nll_standard_error")
        tokens = record.get("valid/num_tokens")
        rows.append(
            [
                f"{record['step']:,}",
                "" if epoch is None else f"{epoch:.2f}",
                f"{nll:.4f}",
                "" if error is None else f"{error:.4f}",
                _perplexity(nll),
                "" if tokens is None else f"{tokens:,}",
            ]
        )
    return rows


def _build_sections(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Gives one table a section; settings outside of sections come first."""
    general = {name: value for name, value in config.items() if not isinstance(value, dict)}
    sections = {"general": general} if general else {}
    sections |= {name: value for name, value in config.items() if isinstance(value, dict)}
    return [
        (str(title), [(name, _format_setting(value)) for name, value in _flatten(section)])
        for title, section in sections.items()
    ]


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _format_setting(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _label(name: str) -> str:
    for suffix, replacement in (("_bytes", ""), ("_seconds", "_time")):
        if name.endswith(suffix):
            name = name.removesuffix(suffix) + replacement
    words = name.removeprefix("num_").replace("_", " ").replace(".", ": ")
    words = words.replace("flops", "FLOPs")
    return words[:1].upper() + words[1:]


def _format_fact(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _format_setting(value)
    if name.endswith("_bytes"):
        return f"{value / 2**30:,.2f} GiB" if value >= 2**29 else f"{value / 2**20:,.1f} MiB"
    if name.endswith("_seconds"):
        return format_duration(value)
    if abs(value) >= _SCIENTIFIC_FROM:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa} \u00d7 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _last_with(records: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    return next((record for record in reversed(records) if name in record), None)


def _read_mapping(path: Path) -> dict[str, Any]:
    """Reads a JSON or YAML mapping; a missing file is an empty one."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"{path} cannot be read ({error}): it must be valid {path.suffix[1:].upper()}; "
            "write it again or move it away."
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path} holds {type(content).__name__} at its top: it must be a mapping of names to "
            "values; write it again or move it away."
        )
    return content


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
        "settings": [(name, _format_setting(value)) for name, value in settings.items()],
    }
