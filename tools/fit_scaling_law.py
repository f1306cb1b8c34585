"""Fits a scaling law to a table of runs, with intervals, profiles and isoFLOP parabolas."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Fits solve many small problems: threads would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import run_command
from megatron_mdm.studies.laws.command import FitSettings, fit_and_report

_DEFAULTS = FitSettings()


def main(table: Path, /, *, settings: FitSettings = _DEFAULTS) -> None:
    """Prints the fit and writes the law file and plots.

    Args:
        table: CSV or Parquet, a row a run.
        settings: What to fit and what to write.
    """
    print("\n".join(fit_and_report(table, settings)))


if __name__ == "__main__":
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
