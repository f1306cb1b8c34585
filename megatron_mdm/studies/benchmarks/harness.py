"""What every benchmark shares: isolated and interleaved measurements, and the report."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from megatron_mdm.config import Config, parse_config
from megatron_mdm.studies.machine import describe_machine

Value = TypeVar("Value")
_KIB = 1024


class Measurement(NamedTuple, Generic[Value]):
    """One run of one case.

    Attributes:
        seconds: The time on the wall clock.
        cpu_seconds: The time on all cores, child processes included. Other programs on the
            machine disturb it less.
        peak_bytes: The peak resident memory of the process.
        child_peak_bytes: That of the largest of its child processes, and at least the size of
            the process when it started them; 0 without any.
        value: What the function returned.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    child_peak_bytes: int
    value: Value


def run_isolated(function: Callable[..., Value], *arguments: Any) -> Measurement[Value]:
    """Runs a function in a fresh process, whose start and imports do not count.

    Args:
        function: A function that a module holds, which may start processes itself.
        *arguments: Its arguments.

    Returns:
        The measurement with the function's value.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(_measure, function, *arguments).result()


def interleave(cases: Mapping[str, Callable[[], Value]], repeats: int) -> dict[str, list[Value]]:
    """Runs all cases in turn, again and again, so that a slow minute of the machine hits each.

    Args:
        cases: What to run, by name.
        repeats: How often, 1 or more.

    Returns:
        What each case returned, in order.
    """
    measurements: dict[str, list[Value]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            measurements[name].append(case())
    return measurements


def run_in_turn(
    cases: Mapping[str, tuple[Any, ...]], repeats: int
) -> dict[str, list[Measurement[Any]]]:
    """Runs all cases in turn, each time in a fresh process.

    Args:
        cases: Of each the function and its arguments, as `run_isolated` takes them, by name.
        repeats: How often, 1 or more.

    Returns:
        The measurements of each case, in order.
    """
    isolated = {name: partial(run_isolated, *case) for name, case in cases.items()}
    return interleave(isolated, repeats)


def summarize_times(runs: Sequence[Measurement[Any]]) -> dict[str, dict[str, float]]:
    """Summarizes the time of repeated measurements, on the clock and on all cores."""
    return {
        "seconds": summarize([run.seconds for run in runs]),
        "cpu_seconds": summarize([run.cpu_seconds for run in runs]),
    }


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Summarizes repeated measurements.

    Args:
        values: The measurements, at least one.

    Returns:
        Their median, least and largest value, and the distance of the two as a share of the
        median.
    """
    median = statistics.median(values)
    low, high = min(values), max(values)
    return {
        "median": round(median, 4),
        "min": round(low, 4),
        "max": round(high, 4),
        "spread": round((high - low) / median, 4) if median else 0.0,
    }


def summarize_ratios(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Summarizes how many times another measurement each is, pair by pair.

    Args:
        values: The measurements.
        others: Those of the same turns.

    Returns:
        As `summarize`.
    """
    return summarize([one / other for one, other in zip(values, others, strict=True)])


def compare_cases(
    pairs: Iterable[tuple[str, str]], **measured: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, Any]]:
    """Summarizes how many times those of another case the measurements of a case are.

    Args:
        pairs: Names of a case and of the other one.
        **measured: By what was measured and by case, in order; what is not above 0 counts as 1
            where it would divide, such as bytes of a case that needs none.

    Returns:
        `ONE_over_OTHER` for each pair, a summary of each measurement.
    """
    return {
        f"{one}_over_{other}": {
            what: summarize_ratios(of[one], [value if value > 0 else 1 for value in of[other]])
            for what, of in measured.items()
        }
        for one, other in pairs
    }


def now(device: Any) -> float:
    """Seconds on a clock that stands still until a device of torch has done what it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def bare_config(
    model: Mapping[str, Any], *, seq_length: int, micro_batch_size: int = 1, **sections: Any
) -> Config:
    """The configuration of something that is built from one and is no run: it reads no data.

    Args:
        model: Sizes.
        seq_length: Tokens of a window, S.
        micro_batch_size: Sequences of a micro batch, which is all of a step.
        **sections: Others, and fields of `run`, over these.

    Returns:
        The configuration.

    Raises:
        ConfigError: A size is not valid.
    """
    batch = {"micro_batch_size": micro_batch_size, "global_batch_size": micro_batch_size}
    tree = {
        "model": dict(model),
        "objective": {"kind": "mdm"},
        "data": {"train": [{"path": "unused"}], "seq_length": seq_length},
        "batch": batch,
        "schedule": {"steps": 1000},
    }
    return parse_config(tree | sections | {"run": {"dir": "unused"} | sections.get("run", {})})


def make_report(benchmark: str, settings: Any, results: Mapping[str, Any]) -> dict[str, Any]:
    """Puts a benchmark's results into one object.

    Args:
        benchmark: The name of the benchmark.
        settings: What it was run with: a dataclass.
        results: What it found.

    Returns:
        An object that JSON can hold.
    """
    return {
        "benchmark": benchmark,
        "settings": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(settings).items()
        },
        "machine": describe_machine(),
        "results": dict(results),
    }


def _measure(function: Callable[..., Value], *arguments: Any) -> Measurement[Value]:
    cpu_before = _cpu_seconds()
    start_seconds = time.perf_counter()
    value = function(*arguments)
    seconds = time.perf_counter() - start_seconds
    return Measurement(
        seconds=seconds,
        cpu_seconds=_cpu_seconds() - cpu_before,
        peak_bytes=_peak_bytes(),
        # Linux counts it in KiB.
        child_peak_bytes=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _KIB,
        value=value,
    )


def _peak_bytes() -> int:
    # The system's own count (ru_maxrss) keeps the size of whatever process started this one.
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * _KIB for line in lines if line.startswith("VmHWM:"))


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
