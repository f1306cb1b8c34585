"""The reversal curse: facts told in one direction, asked in the other; or the report alone."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import Count, run_command
from megatron_mdm.studies.papers.reversal import (
    ask_runs,
    prepare_facts,
    require_finished_runs,
    summarize_answers,
    tabulate_accuracies,
    write_reversal,
)
from megatron_mdm.studies.steps import run_step

SWEEP = Path("configs/reversal/runs.yaml")
FOLDER = Path("runs/reversal")


def main(*, report_only: bool = False, jobs: Count = 2, out: Path = FOLDER) -> None:
    """Runs what is not done, asks every model, and writes the report.

    Args:
        report_only: Train nothing, ask again.
        jobs: Runs at a time.
        out: Folder of the report.
    """
    started = time.monotonic()
    if report_only:
        require_finished_runs(SWEEP)
    facts = prepare_facts(FOLDER)
    if not report_only:
        run_step("sweep", "run", SWEEP, "--jobs", jobs)
    answers = ask_runs(SWEEP, facts)
    findings = summarize_answers(answers)
    paths = write_reversal(out, findings, answers)
    print(f"\n{tabulate_accuracies(findings).to_markdown()}")
    print(f"{time.monotonic() - started:.0f} s: open {paths['html']} or {paths['png']}")


if __name__ == "__main__":
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
