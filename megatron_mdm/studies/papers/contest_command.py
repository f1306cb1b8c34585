"""`mdm contest`."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_mdm.core.options import Count
from megatron_mdm.studies.papers.contest import climb, compete, tune
from megatron_mdm.studies.papers.contest_file import read_contest
from megatron_mdm.studies.papers.contest_report import write_contest


def run_contest(file: Path, /, *, jobs: Count = 1, report_only: bool = False) -> None:
    """Tunes AR and diffusion by as many trials each, and says which is better.

    Args:
        file: YAML file of the contest.
        jobs: Runs at a time.
        report_only: Report on what has been run so far.
    """
    contest, started = read_contest(file), time.monotonic()
    num_jobs = 0 if report_only else jobs
    trials = tune(contest, num_jobs)
    results, rungs = compete(contest, trials, num_jobs), climb(contest, num_jobs)
    reference = next(iter(contest.contestants))
    page, picture, verdict = write_contest(Path(contest.dir), results, rungs, reference)
    print(f"\n{verdict}")  # noqa: T201 - what a user asked for
    print(f"\n{time.monotonic() - started:.0f} s: open {page} or {picture}")  # noqa: T201
