"""Predicts memory, communication and speed of a run on machines that are not at hand."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.config import load_config
from megatron_mdm.core.errors import ConfigError, run_entry_point
from megatron_mdm.model.memory import Dtype
from megatron_mdm.studies.costs.clusters import CLUSTERS, Cluster, cluster_of
from megatron_mdm.studies.costs.layouts import predict
from megatron_mdm.studies.costs.presentation import NOTICE, as_plain, detail_lines, table_lines


def main() -> None:
    """Prints what the config's own layout, or the best ones, would need and take."""
    arguments = parse_arguments()
    config = load_config(arguments.config, arguments.overrides)
    dtype: Dtype = "fp32" if config.run.dtype == "fp32" else "bf16"
    given = {field.name: getattr(arguments, field.name) for field in fields(Cluster)}
    cluster = cluster_of(arguments.cluster, **given)
    estimates = [
        one
        for num_gpus in whole_numbers("--gpus", arguments.gpus)
        for one in predict(
            config,
            cluster,
            world_size=num_gpus,
            dtype=dtype,
            num_best=arguments.best and whole_numbers("--best", arguments.best)[0],
            samples_per_gpu=arguments.samples_per_gpu
            and whole_numbers("--samples-per-gpu", arguments.samples_per_gpu)[0],
        )
    ]
    if arguments.json:
        print(json.dumps([as_plain(one, dtype) for one in estimates], indent=2))
        return
    is_alone = len(estimates) == 1
    lines = detail_lines(estimates[0], cluster, dtype) if is_alone else table_lines(estimates)
    print("\n".join([NOTICE, *lines]))


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--gpus", required=True, metavar="N,N", help="one or several numbers")
    parser.add_argument("--cluster", default="h100", help=f"one of {', '.join(CLUSTERS)}")
    parser.add_argument("--best", metavar="N", help="rank the N fastest layouts that fit")
    parser.add_argument("--samples-per-gpu", metavar="N", help="sets batch.global_batch_size")
    parser.add_argument("--json", action="store_true", help="print JSON")
    for field in fields(Cluster):
        kind = int if field.name == "gpus_per_node" else float
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=kind, help="instead of the cluster's")
    return parser.parse_intermixed_args()


def whole_numbers(option: str, text: str) -> list[int]:
    """Reads numbers above 0, separated by commas."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"{option}={text} is not valid: give a whole number above 0.")
    return [int(part) for part in parts]


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
