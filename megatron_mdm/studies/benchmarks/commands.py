"""`mdm benchmark`: runs the benchmark whose settings it is given."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_mdm.core.options import make_app
from megatron_mdm.core.quiet import quiet_engines
from megatron_mdm.studies.benchmarks.harness import make_report
from megatron_mdm.studies.benchmarks.settings import BENCHMARKS, BenchmarkSettings


def run_benchmark(settings: BenchmarkSettings) -> dict[str, Any] | None:
    """Measures, in a folder that is removed afterwards.

    Args:
        settings: Of one of `BENCHMARKS`, and so of which.

    Returns:
        The report; None on a rank that does not lead.

    Raises:
        MdmError: A setting cannot be measured.
    """
    name = next(name for name, kind in BENCHMARKS.items() if type(settings) is kind)
    with report_alone_on_stdout(), tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        quiet_engines(use_cpu=getattr(settings, "device", None) == "cpu")
        # Imported now, so that none waits for the libraries of the others.
        module, _, function = settings.measure.partition(":")
        measure = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        given = (Path(folder), settings) if settings.uses_folder else (settings,)
        results = measure(*given)
    return None if results is None else make_report(name, settings, results)


@contextlib.contextmanager
def report_alone_on_stdout() -> Iterator[None]:
    """Sends what engines print in the block to standard error: stdout holds results alone.

    That holds for processes that start in the block, too, whose engines print as they are imported.
    """
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def _run_and_print(settings: BenchmarkSettings | None) -> None:
    # Of several processes one reports; nothing is measured where help was asked for.
    report = None if settings is None else run_benchmark(settings)
    if report is not None:
        print(json.dumps(report, indent=2))  # noqa: T201 - the result


app = make_app(
    BENCHMARKS,
    "Measures the project's speed on this machine and prints one JSON object.",
    name="benchmark",
    examples=("mdm benchmark train --steps 20", "mdm benchmark data --help"),
    finish=_run_and_print,
)
