"""Writes the HTML report of a run directory, or of several a comparison."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import ConfigError, run_entry_point
from megatron_mdm.reporting.comparison import write_comparison
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
        "--run",
        type=Path,
        required=True,
        nargs="+",
        metavar="DIR",
        help="directory of the run; several are compared on common axes",
    )
    parser.add_argument(
        "--samples", type=Path, metavar="FILE", help="JSON file of samples to show (default: none)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="page to write (default: DIR/report.html, or comparison.html beside the first DIR)",
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Writes the page and prints where it is.

    Raises:
        ConfigError: Samples were given for a comparison.
    """
    arguments = parse_arguments()
    if len(arguments.run) == 1:
        page = write_report(arguments.run[0], arguments.output, samples_path=arguments.samples)
    elif arguments.samples is not None:
        raise ConfigError(
            f"--samples={arguments.samples} belongs to the report of one run, and --run names "
            f"{len(arguments.run)}: leave the samples out, or name one run."
        )
    else:
        page = write_comparison(arguments.run, arguments.output)
    print(page)


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
