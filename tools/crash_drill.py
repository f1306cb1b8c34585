"""Kills a small run again and again, and checks that it ends as if it had never been killed."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line.

    Args:
        arguments: Arguments without the program name; None reads those of the process.

    Returns:
        `kills`, `seed` and `folder`.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--kills", type=int, default=50, help="how often, at least 2 (default 50)")
    add("--seed", type=int, default=0, help="seed of the moments (default 0)")
    add("--folder", type=Path, metavar="DIR", help="keep runs and logs there (default: remove)")
    options = parser.parse_args(arguments)
    if options.kills < 2:
        parser.error(f"--kills {options.kills} is too few: give at least 2.")
    return options


def main() -> int:
    """Runs the drill and prints its reports.

    Returns:
        0 if every run equals the one that was never killed, otherwise 1.
    """
    options = parse_arguments()
    # Tiny models on CPUs, whatever the machine: libraries read these when they are imported.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    from megatron_mdm.studies.crash_drill import run_drill

    with tempfile.TemporaryDirectory(prefix="crash-drill-") as temporary:
        reports = run_drill(options.folder or Path(temporary), options.kills, options.seed)
    for report in reports:
        compared = "metrics so far" if report.broke_off else "metrics and last checkpoint"
        is_equal = report.same_metrics and (report.same_checkpoint or bool(report.broke_off))
        print(
            f"{report.name}: {report.kills} kills, {report.kills_during_a_save} of them during a "
            f"save, {report.resumes} resumes, {report.samples_lost} samples lost, "
            f"{report.samples_repeated} repeated, "
            f"{report.leftovers} temporary files left, {compared} "
            f"{'equal' if is_equal else 'DIFFERENT from'} "
            f"those of a run never killed, {report.seconds:.0f} s"
        )
        if report.broke_off:
            print(f"The drill broke off before its last kill: {report.broke_off}")
    return 0 if all(report.passed for report in reports) else 1


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
