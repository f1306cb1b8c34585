"""Shards as they are, and as a run would see them."""

from __future__ import annotations

from pathlib import Path

from megatron_mdm.config import load_config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.corpus.sample import decode_sample, show_source
from megatron_mdm.data.inspection import report_store
from megatron_mdm.data.ledger import format_ledger
from megatron_mdm.data.store import open_tokens


def inspect(*words: str, show: int | None = None, plan: Path | None = None) -> None:
    """Prints what is known of shards and checks them, or prints the ledger of a planned run.

    Args:
        words: The path of shards or a view, no extension; with --plan section.key=value.
        show: Show the first so many documents, ids and text.
        plan: Show the ledger of the run of this configuration.
    """
    if show is not None and show < 1:
        raise ConfigError(f"--show={show} shows nothing: give at least 1.")
    if show is not None and plan is not None:
        raise ConfigError("--show shows documents and --plan a run: give one of them.")
    if plan is not None:
        _show_plan(plan, list(words))
    elif len(words) == 1:
        _show_shards(Path(words[0]), show)
    else:
        raise ConfigError("give the path of one set of shards, or --plan CONFIG.")


def _show_plan(path: Path, overrides: list[str]) -> None:
    # Shards are looked at without the rooms of training.
    from megatron_mdm.training.data_plan import compute_ledger, plan_data

    config = load_config(path, overrides)
    plan = plan_data(config)
    tokens = plan.order.total * config.data.seq_length
    print(f"{plan.num_steps:,} steps, {plan.order.total:,} windows, {tokens:,} tokens")
    print(format_ledger(compute_ledger(config, plan, plan.num_steps)))
    for remark in plan.remarks:
        print(remark)


def _show_shards(prefix: Path, num_shown: int | None = None) -> None:
    # The first documents are shown before all checks, which may take long.
    source = open_tokens(prefix)
    sample = None
    if num_shown is not None:
        for line in show_source(source, num_shown):
            print(line, flush=True)
    elif source.manifest is not None:
        sample = decode_sample(source, source.manifest)
    for line in report_store(source, sample):
        print(line)
