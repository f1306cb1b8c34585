"""Predicts memory, communication and speed of a run on machines that are not at hand."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import run_command
from megatron_mdm.studies.costs.command import EstimateSettings, describe_run


def main(*overrides: str, settings: EstimateSettings) -> None:
    """Prints what the config's own layout, or the best ones, would need and take.

    Args:
        overrides: section.key=value, as for a run.
        settings: Which run, and on what.
    """
    print(describe_run(settings, overrides))


if __name__ == "__main__":
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
