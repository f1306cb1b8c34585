"""The reversal curse: facts told in one direction, asked in the other; or the report alone."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.studies.papers.reversal import prepare_facts, question_runs, summarize_answers
from megatron_mdm.studies.papers.reversal_report import reversal_table, write_reversal
from megatron_mdm.studies.papers.steps import run_step

REPO = Path(__file__).resolve().parent.parent
SWEEP = Path("configs/reversal/runs.yaml")
FOLDER = Path("runs/reversal")


def main() -> None:
    """Runs what is not done, asks every model, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report-only", action="store_true", help="train nothing, ask again")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"of the report ({FOLDER})")
    arguments = parser.parse_args()
    started = time.monotonic()
    facts = prepare_facts(REPO, FOLDER)
    if not arguments.report_only:
        run_step(REPO, "tools/sweep.py", "run", SWEEP, "--jobs", str(arguments.jobs))
    answers = question_runs(REPO, SWEEP, facts)
    findings = summarize_answers(answers)
    table, picture, _ = write_reversal(arguments.out, findings, answers)
    print(f"\n{reversal_table(findings)}")
    print(f"{time.monotonic() - started:.0f} s: open {table} and {picture}")


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
