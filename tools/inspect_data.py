"""Checks token shards and shows what they hold, or shows what a planned run would see."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.config import load_config
from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.corpus.sample import decoded_sample, shown_source
from megatron_mdm.data.inspection import report_lines
from megatron_mdm.data.ledger import format_ledger
from megatron_mdm.data.store import open_tokens
from megatron_mdm.training.data_plan import ledger_at, plan_data


def main() -> None:
    """Prints what is known of shards and checks them, or prints the ledger of a planned run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", nargs="?", help="the path of shards or a view, no extension")
    parser.add_argument(
        "--show", type=int, metavar="N", help="show the first N documents, ids and text"
    )
    parser.add_argument("--plan", type=Path, metavar="CONFIG", help="show this run's ledger")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="with --plan")
    arguments = parser.parse_intermixed_args()
    if arguments.show is not None and arguments.show < 1:
        parser.error(f"--show={arguments.show} shows nothing: give at least 1")
    if arguments.show is not None and arguments.plan is not None:
        parser.error("--show shows documents and --plan a run: give one of them")
    if arguments.plan is not None:
        overrides = [arguments.prefix, *arguments.overrides] if arguments.prefix else []
        show_plan(arguments.plan, overrides)
    elif arguments.prefix is None or arguments.overrides:
        parser.error("give the path of one set of shards, or --plan CONFIG")
    else:
        show_shards(Path(arguments.prefix), arguments.show)


def show_plan(path: Path, overrides: list[str]) -> None:
    """Prints how often a run would see each source, without starting it.

    Args:
        path: The run's YAML file.
        overrides: `section.key=value` strings.

    Raises:
        MdmError: The run could not start.
    """
    config = load_config(path, overrides)
    plan = plan_data(config)
    tokens = plan.order.total * config.data.seq_length
    print(f"{plan.num_steps:,} steps, {plan.order.total:,} windows, {tokens:,} tokens")
    print(format_ledger(ledger_at(config, plan, plan.num_steps)))
    for remark in plan.remarks:
        print(remark)


def show_shards(prefix: Path, num_shown: int | None = None) -> None:
    """Prints the report, with a decoded sample or after the first documents.

    Args:
        prefix: The path without extension.
        num_shown: The documents to show, before all checks, which may take long; None: a sample.

    Raises:
        DataError: The shards are damaged.
    """
    source = open_tokens(prefix)
    sample = None
    if num_shown is not None:
        for line in shown_source(source, num_shown):
            print(line, flush=True)
    elif source.manifest is not None:
        sample = decoded_sample(source, source.manifest)
    for line in report_lines(source, sample):
        print(line)


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
