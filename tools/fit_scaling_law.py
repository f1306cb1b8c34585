"""Fits a scaling law to a table of runs, with intervals, profiles and isoFLOP parabolas."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.config import CONVENTIONS
from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.studies.laws.command import FitRequest, fit_and_report


def main() -> None:
    """Prints the fit and writes the law file and plots."""
    for line in fit_and_report(parse_arguments()):
        print(line)


def parse_arguments() -> FitRequest:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path, metavar="RUNS", help="CSV or Parquet, a row a run")
    parser.add_argument("--form", help="chinchilla, data_constrained or geometric")
    parser.add_argument(
        "--fit", metavar="NAME,NAME", help="constants to fit; default: all not held"
    )
    parser.add_argument("--hold", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--tie-exponents", action="store_true", help="fit alpha = beta")
    parser.add_argument(
        "--bootstrap", dest="num_resamples", type=int, default=0, metavar="N", help="resamples"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument(
        "--profile", dest="profiles", action="append", default=[], metavar="NAME[=LOW:HIGH]"
    )
    parser.add_argument("--isoflop", action="store_true", help="parabolas at equal 6 N D")
    parser.add_argument("--objective", choices=["mdm", "ar"], help="fit these runs")
    parser.add_argument(
        "--column", action="append", default=[], metavar="loss=NAME", help="a column's other name"
    )
    parser.add_argument(
        "--parameters", choices=CONVENTIONS, help="which N; default: what the column's name says"
    )
    parser.add_argument("--skip-failed", action="store_true", help="leave out runs without a loss")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for law.json and plots")
    return FitRequest(**vars(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
