"""AR against masked diffusion on little data: corpora, sweeps and a report; or the report alone."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import Count, run_command
from megatron_mdm.studies.papers.crossover import compare
from megatron_mdm.studies.papers.crossover_report import describe_comparison, write_crossover
from megatron_mdm.studies.papers.crossover_runs import prepare_corpora, read_sweeps
from megatron_mdm.studies.papers.gap_trend import fit_gap_trends
from megatron_mdm.studies.steps import run_step

SWEEPS = tuple(
    Path("configs/crossover") / f"{name}.yaml"
    for name in ("more_tokens", "unique_tokens", "sizes", "bpe", "learning_rates")
)
FOLDER = Path("runs/crossover")


def main(
    *sweeps: Path,
    report_only: bool = False,
    best_size: bool = False,
    prepare_only: bool = False,
    jobs: Count = 2,
    out: Path = FOLDER,
) -> None:
    """Runs what is not done, and writes the report.

    Args:
        sweeps: Sweep files; without any, those of configs/crossover.
        report_only: Report on what has been run so far.
        best_size: Let each objective have its best size.
        prepare_only: Make the corpora alone.
        jobs: Runs at a time.
        out: Folder of the report.
    """
    started = time.monotonic()
    if prepare_only:
        prepare_corpora(FOLDER)
        return
    if not report_only:
        if not sweeps:
            prepare_corpora(FOLDER)
        run_step("sweep", "run", *(sweeps or SWEEPS), "--jobs", jobs)
    runs, missing = read_sweeps(sweeps or SWEEPS, best_size=best_size)
    comparisons = compare(runs)
    page, picture = write_crossover(out, comparisons, fit_gap_trends(comparisons), missing)
    print(*(f"\n{describe_comparison(one)}" for one in comparisons), sep="\n")
    print(f"\n{time.monotonic() - started:.0f} s: open {page} or {picture}")


if __name__ == "__main__":
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
