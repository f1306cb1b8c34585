"""AR against masked diffusion on little data: corpora, sweeps and a report; or the report alone."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.studies.papers.crossover import compare
from megatron_mdm.studies.papers.crossover_corpora import prepare_corpora
from megatron_mdm.studies.papers.crossover_report import verdict, write_crossover
from megatron_mdm.studies.papers.crossover_runs import read_sweeps
from megatron_mdm.studies.papers.gap_trend import gap_trends
from megatron_mdm.studies.papers.steps import run_step

REPO = Path(__file__).resolve().parent.parent
SWEEPS = tuple(
    Path("configs/crossover") / f"{name}.yaml"
    for name in ("more_tokens", "unique_tokens", "sizes", "bpe", "learning_rates")
)
FOLDER = Path("runs/crossover")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "sweeps",
        type=Path,
        nargs="*",
        default=SWEEPS,
        help="sweep files (those of configs/crossover)",
    )
    add("--report-only", action="store_true", help="report on what has been run so far")
    add("--best-size", action="store_true", help="let each objective have its best size")
    add("--jobs", type=int, default=2, help="runs at a time (2)")
    add("--out", type=Path, default=FOLDER, help=f"folder of the report ({FOLDER})")
    return parser.parse_args()


def main() -> None:
    """Runs what is not done, and writes the report."""
    arguments = parse_arguments()
    started = time.monotonic()
    if not arguments.report_only:
        if tuple(arguments.sweeps) == SWEEPS:
            prepare_corpora(REPO, FOLDER)
        run_step(REPO, "tools/sweep.py", "run", *arguments.sweeps, "--jobs", str(arguments.jobs))
    runs, missing = read_sweeps(arguments.sweeps, best_size=arguments.best_size)
    comparisons = compare(runs)
    page, picture = write_crossover(arguments.out, comparisons, gap_trends(comparisons), missing)
    print(*(f"\n{verdict(one)}" for one in comparisons), sep="\n")
    print(f"\n{time.monotonic() - started:.0f} s: open {page} or {picture}")


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
