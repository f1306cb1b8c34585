"""Facts told in one direction and asked in the other: masked diffusion beside AR, on one page."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import Count, run_command
from megatron_mdm.studies.papers.demo import (
    list_next_commands,
    prepare_demo,
    replay_infilling,
    tabulate_findings,
    write_demo,
)
from megatron_mdm.studies.papers.reversal import ask_runs, summarize_answers
from megatron_mdm.studies.steps import run_step

SWEEP = Path("configs/demo/runs.yaml")
FOLDER = Path("runs/demo")


def main(*, jobs: Count = 2) -> None:
    """Runs the steps; each reuses what it finds done and says so.

    Args:
        jobs: Runs at a time.
    """
    started = time.monotonic()
    facts = prepare_demo(FOLDER)
    run_step("sweep", "run", SWEEP, "--jobs", jobs)
    answers = ask_runs(SWEEP, facts)
    replay = replay_infilling(FOLDER, FOLDER / "mdm/hf", facts)
    findings = summarize_answers(answers)
    page = write_demo(FOLDER, findings, answers, replay)["html"]
    print(f"\n{tabulate_findings(findings).to_markdown()}")
    for purpose, command in list_next_commands(FOLDER):
        print(f"next: {command}   # {purpose}")
    print(f"\n{time.monotonic() - started:.0f} s: open {page}")


if __name__ == "__main__":
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
