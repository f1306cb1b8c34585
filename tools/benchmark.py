"""Measures the project's speed on this machine and prints one JSON object."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import run_command
from megatron_mdm.studies.benchmarks.commands import run_benchmark
from megatron_mdm.studies.benchmarks.settings import BENCHMARKS


def main() -> None:
    """Runs the benchmark that the first argument names."""
    settings = run_command(BENCHMARKS, __doc__)
    report = None if settings is None else run_benchmark(settings)
    # Of several processes one reports.
    if report is not None:
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
