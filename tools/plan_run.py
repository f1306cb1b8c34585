"""Decides how to spend compute on a corpus: AR or masked diffusion, what size, how many epochs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.config import CONVENTIONS
from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.studies.costs.clusters import CLUSTERS
from megatron_mdm.studies.sweeps.plan_command import plan_run
from megatron_mdm.studies.sweeps.plan_options import FAMILIES
from megatron_mdm.studies.sweeps.plan_report import plan_as_plain, plan_lines


def main() -> None:
    """Prints a plan; writes the configuration and the picture where asked to."""
    arguments = parse_arguments()
    plan, costs = plan_run(
        unique_tokens=arguments.unique_tokens,
        training_flops=arguments.flops,
        law_paths=arguments.law,
        family=arguments.family,
        cluster=arguments.cluster,
        num_gpus=arguments.gpus,
        config_path=arguments.out,
        train_prefix=arguments.train,
        valid_prefix=arguments.valid,
        plot_path=arguments.plot,
        parameters=arguments.parameters,
    )
    if arguments.json:
        print(json.dumps(plan_as_plain(plan, costs), indent=2))
        return
    print("\n".join(plan_lines(plan, costs, arguments.cluster)))
    for what, path in (("configuration", arguments.out), ("picture", arguments.plot)):
        if path is not None:
            print(f"wrote the {what} {path}")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--unique-tokens", type=float, required=True, help="distinct tokens of the corpus, as 1e8")
    add("--flops", type=float, required=True, help="budget, 6 N D, as 1e20")
    add("--parameters", choices=CONVENTIONS, help="N of --flops (as the family counts)")
    add("--law", type=Path, action="append", default=[], help="law file; once for AR, once for MDM")
    add("--family", choices=FAMILIES, default="dc", help="presets to choose from (dc)")
    add("--cluster", choices=list(CLUSTERS), default="h100", help="where it would run (h100)")
    add("--gpus", type=int, default=8, help="how many (8)")
    add("--out", type=Path, help="YAML file of the run to write")
    add("--train", help="shards to train on; the plan takes their vocabulary (data/train)")
    add("--valid", help="held-out shards, for --out (those beside --train)")
    add("--plot", type=Path, help="PNG or SVG of the trade-off to write")
    add("--json", action="store_true", help="print JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
