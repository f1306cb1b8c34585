"""Predicts memory, communication and speed of a run on machines that are not at hand."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import run_command
from megatron_mdm.studies.costs.command import EstimateSettings, describe_run
from megatron_mdm.studies.simulation.command import describe_simulations


def main(*overrides: str, settings: EstimateSettings) -> int:
    """Prints what the config's own layout, or the best ones, would need and take, or plays it.

    Ends with status 1 if ranks that were played wait for ever.

    Args:
        overrides: section.key=value, as for a run.
        settings: Which run, and on what.
    """
    ends = True
    if settings.simulate:
        text, ends = describe_simulations(settings, overrides)
    else:
        text = describe_run(settings, overrides)
    print(text)
    return 0 if ends else 1


if __name__ == "__main__":
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
