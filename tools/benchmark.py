"""Measures the project's speed on this machine and prints one JSON object."""

from __future__ import annotations

import argparse
import json
import os
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.benchmarks.data_loading import measure_loader
from megatron_mdm.benchmarks.data_preprocessing import measure_growth, measure_preprocessing
from megatron_mdm.benchmarks.harness import make_report
from megatron_mdm.errors import run_entry_point

DATA_PARTS = {
    "preprocess": measure_preprocessing,
    "growth": measure_growth,
    "loader": measure_loader,
}


def main() -> None:
    """Runs the benchmark that the first argument names."""
    parser = argparse.ArgumentParser(description=__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    add_data(benchmarks.add_parser("data", help="preprocessing and the loader: rates, growth"))
    checkpoint = benchmarks.add_parser("checkpoint", help="saving, checking and loading: rates")
    checkpoint.add_argument("--repeats", type=int, default=3, help="runs of each case (default 3)")
    checkpoint.set_defaults(run=run_checkpoint)
    arguments = parser.parse_args()
    print(json.dumps(arguments.run(arguments), indent=2))


def add_data(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the data benchmarks."""
    add = parser.add_argument
    add("--part", choices=[*DATA_PARTS, "all"], default="all", help="what to measure (all)")
    add("--workers", type=int, default=2, help="processes that encode (default 2)")
    add("--megabytes", type=float, default=30, help="millions of bytes of text (default 30)")
    add("--repeats", type=int, default=3, help="runs of each case, in turn (default 3)")
    add(
        "--root",
        type=Path,
        default=Path(sysconfig.get_paths()["stdlib"]),
        help="Python sources to make documents of (default: this Python's standard library)",
    )
    parser.set_defaults(run=run_data)


def run_data(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures the chosen parts, each in a folder of its own that is removed."""
    settings = {name: getattr(arguments, name) for name in ("workers", "megabytes", "repeats")}
    results = {}
    for part, measure in DATA_PARTS.items():
        if arguments.part in (part, "all"):
            with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
                results[part] = measure(arguments.root, Path(folder), **settings)
    return make_report("data", {**settings, "root": str(arguments.root)}, results)


def run_checkpoint(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures checkpoints on the disk of the temporary folder."""
    # DeepSpeed looks for an accelerator when it is imported, and says so on standard output.
    os.environ["DS_ACCELERATOR"] = "cpu"
    from megatron_mdm.benchmarks.checkpoints import measure_checkpoints

    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        results = measure_checkpoints(Path(folder), repeats=arguments.repeats)
    return make_report("checkpoint", {"repeats": arguments.repeats}, results)


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
