"""Writes the HTML report of a run directory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.errors import run_entry_point
from megatron_mdm.reporting.report import write_report


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line.

    Args:
        arguments: Arguments without the program name; None reads those of the process.

    Returns:
        `run`, `samples` and `output`.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", type=Path, required=True, metavar="DIR", help="directory of the run"
    )
    parser.add_argument(
        "--samples", type=Path, metavar="FILE", help="JSON file of samples to show (default: none)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="page to write (default: DIR/report.html)"
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Writes the report and prints where it is."""
    arguments = parse_arguments()
    print(write_report(arguments.run, arguments.output, samples_path=arguments.samples))


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
