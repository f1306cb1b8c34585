"""Kills a small run again and again, and checks that it ends as if it had never been killed."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import ConfigError, run_entry_point
from megatron_mdm.core.options import run_command


def main(*, kills: int = 50, seed: int = 0, folder: Path | None = None) -> int:
    """Runs the drill and prints its reports.

    Args:
        kills: How often, at least 2.
        seed: Of the moments.
        folder: Keep runs and logs there; removed where not given.

    Returns:
        0 if every run equals the one that was never killed, otherwise 1.
    """
    if kills < 2:
        raise ConfigError(f"--kills={kills} is too few: give at least 2.")
    # Tiny models on CPUs, whatever the machine: libraries read these when they are imported.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    from megatron_mdm.studies.crash_drill import run_drill

    with tempfile.TemporaryDirectory(prefix="crash-drill-") as temporary:
        reports = run_drill(folder or Path(temporary), kills, seed)
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
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
