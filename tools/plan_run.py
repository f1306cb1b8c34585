"""Decides how to spend compute on a corpus: AR or masked diffusion, what size, how many epochs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.files import format_json
from megatron_mdm.core.options import run_command
from megatron_mdm.studies.sweeps.plan_command import PlanSettings, plan_run
from megatron_mdm.studies.sweeps.plan_report import format_plan, plan_to_tree


def main(settings: PlanSettings) -> None:
    """Prints a plan; writes the configuration and the picture where asked to."""
    plan, costs = plan_run(settings)
    if settings.json:
        print(format_json(plan_to_tree(plan, costs), indent=2))
        return
    print("\n".join(format_plan(plan, costs, settings.cluster)))
    for what, path in (("configuration", settings.out), ("picture", settings.plot)):
        if path is not None:
            print(f"wrote the {what} {path}")


if __name__ == "__main__":
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
