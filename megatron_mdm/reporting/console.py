"""The lines that a run prints: one per logged step, one per validation."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_mdm.reporting.metrics import (
    MetricValue,
    list_averages,
    list_judges,
    name_average_group,
    name_judge,
)

_COUNT_SUFFIXES = ("", "k", "M", "B", "T", "P", "E")
_MIN_STEP_WIDTH = 4


def format_count(count: float) -> str:
    """Formats a count with three significant digits and a magnitude letter.

    Args:
        count: Any number, such as tokens or tokens per second.

    Returns:
        For example 950, 12.3k, 1.03B; numbers beyond 10^21 in scientific notation.
    """
    if not math.isfinite(count):
        return str(count)
    for power, suffix in enumerate(_COUNT_SUFFIXES):
        scaled = float(f"{count / 1000**power:.3g}")
        if abs(scaled) < 1000:
            return f"{scaled:g}{suffix}"
    return f"{count:.3g}"


def format_duration(seconds: float) -> str:
    """Formats a duration in its two largest units.

    Args:
        seconds: Duration, 0 or greater; a non-finite one is unknown.

    Returns:
        For example 3.2s, 45s, 4m10s, 2h05m, 3d04h, or "unknown".
    """
    if not math.isfinite(seconds):
        return "unknown"
    if 0 < seconds < 9.95:
        return f"{seconds:.1f}s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02d}h"
    if hours:
        return f"{hours}h{minute:02d}m"
    if minutes:
        return f"{minutes}m{second:02d}s"
    return f"{second}s"


def format_training_line(
    record: Mapping[str, MetricValue], *, total_steps: int, eta_seconds: float | None
) -> str:
    """Formats a training record; metrics that the record does not hold are left out.

    Args:
        record: A training record of `MetricsLogger`, with `step`.
        total_steps: Steps of the whole run, at least 1.
        eta_seconds: Time to the end of the run, or None when not known yet.

    Returns:
        One line, such as `step  120/900 | loss 5.1234 nats/token | grad 1.03 | lr 3.0e-04 |
        8.1k tok/s | 41% of peak | epoch 0.34 | ETA 4m10s`.
    """
    width = max(_MIN_STEP_WIDTH, len(str(total_steps)))
    parts = [f"step {record['step']:>{width}}/{total_steps}"]
    formats = {
        "train/loss_nats_per_token": lambda value: f"loss {value:.4f} nats/token",
        "train/grad_norm": lambda value: f"grad {value:.2f}",
        "train/lr": lambda value: f"lr {value:.1e}",
        "perf/tokens_per_second": lambda value: f"{format_count(value)} tok/s",
        "perf/mfu": lambda value: f"{value:.0%} of peak",
        "epoch": lambda value: f"epoch {value:.2f}",
    }
    parts += [
        formatter(float(record[name])) for name, formatter in formats.items() if name in record
    ]
    if eta_seconds is not None:
        parts.append(f"ETA {format_duration(eta_seconds)}")
    return " | ".join(parts)


def format_validation_line(record: Mapping[str, MetricValue]) -> str:
    """Formats a validation record; metrics that the record does not hold are left out.

    Args:
        record: A validation record of `MetricsLogger`, with `step`.

    Returns:
        One line, such as `valid at step 200 | nll 5.0123 ± 0.0210 nats/token (± 0.0510 by document)
        | given first 5.0019 ± 0.0212 | train 4.8012 ± 0.0230 | gap 0.2111 ± 0.0311 | -0.0451 ±
        0.0084 since step 150`. The loss of MDM beside AR's stands there when it is another one; the
        change is from the best before, window by window. A run of several losses has each, such as
        `as ar 5.0019 ± 0.0212 | as mdm 5.2019 ± 0.0231`. An average of the weights stands there as
        `ema 4.9021 ± 0.0211 (-0.1102 ± 0.0040)`, with the difference from the raw ones in brackets.
    """
    parts = [f"valid at step {record['step']}"]
    unit = " nats/token"
    shown = {"nll": "valid/nll", "train": "train/nll", "gap": "valid/gap"}
    if _is_matched_apart(record):
        shown = {"nll": "valid/nll", "given first": "valid/nll_given_first", **shown}
    for label, name in shown.items():
        if f"{name}_nats_per_token" not in record:
            continue
        # The first number says the unit of all.
        text = f"{label} {_format_with_error(record, name, '.4f')}{unit}"
        unit = ""
        if label == "nll":
            if f"{name}_standard_error" not in record:
                text += " (of one window, without an error)"
            elif f"{name}_clustered_error" in record:
                text += f" (± {float(record[f'{name}_clustered_error']):.4f} by document)"
        parts.append(text)
    for judge in list_judges([record]):
        name = name_judge(judge).removesuffix("_nats_per_token")
        parts.append(f"as {judge} {_format_with_error(record, name, '.4f')}")
    for average in list_averages(record):
        group = name_average_group(average)
        text = _format_with_error(record, f"{group}/nll", ".4f")
        less = _format_with_error(record, f"{group}/less_raw", "+.4f")
        parts.append(f"{average} {text} ({less})")
    if "valid/change_nats_per_token" in record:
        change = _format_with_error(record, "valid/change", "+.4f")
        parts.append(f"{change} since step {record['valid/change_since_step']}")
    if record.get("valid/best_step", record["step"]) != record["step"]:
        best = float(record["valid/best_nll_nats_per_token"])
        parts.append(f"best {best:.4f} at step {record['valid/best_step']}")
    return " | ".join(parts)


def _format_with_error(record: Mapping[str, MetricValue], name: str, form: str) -> str:
    text = f"{float(record[f'{name}_nats_per_token']):{form}}"
    error = record.get(f"{name}_standard_error")
    return text if error is None else f"{text} ± {float(error):.4f}"


def _is_matched_apart(record: Mapping[str, MetricValue]) -> bool:
    matched = record.get("valid/nll_given_first_nats_per_token")
    return matched is not None and matched != record.get("valid/nll_nats_per_token")
