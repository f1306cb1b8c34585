"""What every benchmark shares: isolated and interleaved measurements, and the report."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config import Config, expand_preset, list_presets, parse_config
from megatron_mdm.config.loading import apply_override
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.studies.benchmarks.settings import DEMO_SIZES
from megatron_mdm.studies.machine import describe_machine

Value = TypeVar("Value")
Name = TypeVar("Name", bound=Hashable)
_KIB = 1024


class Measurement(NamedTuple, Generic[Value]):
    """One run of one case.

    Attributes:
        seconds: The time on the wall clock.
        cpu_seconds: The time on all cores, child processes included. Other programs on the
            machine disturb it less.
        peak_bytes: The peak resident memory of the process; of what its tensors took on a GPU,
            where it used one.
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


def interleave(cases: Mapping[Name, Callable[[], Value]], repeats: int) -> dict[Name, list[Value]]:
    """Runs all cases in turn, again and again, so that a slow minute of the machine hits each.

    Args:
        cases: What to run, by name.
        repeats: How often, 1 or more.

    Returns:
        What each case returned, in order.
    """
    measurements: dict[Name, list[Value]] = {name: [] for name in cases}
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


def run_above_floor(
    function: Callable[..., Any], names: Iterable[str], settings: Any, **others: tuple[Any, ...]
) -> dict[str, list[Measurement[Any]]]:
    """Runs the cases of a function in turn, and one that only holds what all of them need.

    Args:
        function: Takes the name of a case, of which `nothing` is one, and the settings.
        names: The others.
        settings: With `repeats`.
        **others: Cases of other functions, by name, as `run_in_turn` takes them.

    Returns:
        As `run_in_turn`, peak memory above that of `nothing`.
    """
    floor = run_isolated(function, "nothing", settings).peak_bytes
    cases = {name: (function, name, settings) for name in names if name != "nothing"}
    return {
        name: [run._replace(peak_bytes=run.peak_bytes - floor) for run in runs]
        for name, runs in run_in_turn(cases | others, settings.repeats).items()
    }


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
        "median": _round(median),
        "min": _round(low),
        "max": _round(high),
        "spread": round((high - low) / median, 4) if median else 0.0,
    }


def _round(value: float) -> float:
    # Four digits of what is less than 1 too, such as the seconds of a GPU's pass.
    return round(value, 4) if abs(value) >= 1 else float(f"{value:.4g}")


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


def find_sizes(preset: str) -> dict[str, Any]:
    """Finds the fields of `model` of a preset, or of `demo`; a ConfigError where there is none."""
    if preset == "demo":
        return dict(DEMO_SIZES)
    if preset not in list_presets():
        known = ", ".join(("demo", *list_presets()))
        raise ConfigError(f"--preset={preset} is unknown: use one of {known}.")
    return expand_preset(preset)


def draw_documents(shape: tuple[int, int], mean_length: int) -> NDArray[np.int32]:
    """Draws documents into windows.

    Args:
        shape: Windows, and their tokens S.
        mean_length: Mean tokens of a document, whose end is drawn token by token.

    Returns:
        int32 [B, S], number of each token's document; the last one of a window is cut.
    """
    ends_BS = np.random.default_rng(2).random(shape) * mean_length < 1
    return (ends_BS.cumsum(1) - ends_BS).astype(np.int32)


def bare_config(
    model: Mapping[str, Any],
    *,
    seq_length: int,
    micro_batch_size: int = 1,
    overrides: Iterable[str] = (),
    **sections: Any,
) -> Config:
    """The configuration of something that is built from one and is no run: it reads no data.

    Args:
        model: Sizes.
        seq_length: Tokens of a window, S.
        micro_batch_size: Sequences of a micro batch, which is all of a step.
        overrides: `section.key=value`, over all else.
        **sections: Others, and fields of `run`, over these.

    Returns:
        The configuration.

    Raises:
        ConfigError: A size or an override is not valid.
    """
    batch = {"micro_batch_size": micro_batch_size, "global_batch_size": micro_batch_size}
    tree = {
        "model": dict(model),
        "objective": {"kind": "mdm"},
        "data": {"train": [{"path": "unused"}], "seq_length": seq_length},
        "batch": batch,
        "schedule": {"steps": 1000},
    }
    tree |= sections | {"run": {"dir": "unused"} | sections.get("run", {})}
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree)


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
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    # The system's own count (ru_maxrss) keeps the size of whatever process started this one.
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * _KIB for line in lines if line.startswith("VmHWM:"))


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
