"""Writes the HTML report of a run directory, or of several a comparison."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import ConfigError, run_entry_point
from megatron_mdm.core.options import run_command
from megatron_mdm.reporting.comparison import write_comparison
from megatron_mdm.reporting.report import write_report


def main(*, run: tuple[Path, ...], samples: Path | None = None, output: Path | None = None) -> None:
    """Writes the page and prints where it is.

    Args:
        run: Directory of the run; several are compared on common axes.
        samples: JSON file of samples to show.
        output: Page to write; without it, report.html in the directory, or comparison.html beside
            the first one.

    Raises:
        ConfigError: Samples were given for a comparison.
    """
    if len(run) == 1:
        page = write_report(run[0], output, samples_path=samples)
    elif samples is not None:
        raise ConfigError(
            f"--samples={samples} belongs to the report of one run, and --run names {len(run)}: "
            "leave the samples out, or name one run."
        )
    else:
        page = write_comparison(run, output)
    print(page)


if __name__ == "__main__":
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
