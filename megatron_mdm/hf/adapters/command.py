"""The command line of tools/finetune_lora.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_mdm.core.quiet import quiet_engines
from megatron_mdm.hf.adapters.saving import check_new
from megatron_mdm.hf.adapters.settings import TARGETS, AdapterSettings


def add_command_line(parser: argparse.ArgumentParser) -> None:
    """Adds the options.

    Args:
        parser: An empty parser.
    """
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="exported model")
    add("--config", type=Path, required=True, help="YAML file, as for pretrain/finetune_mdm.py")
    add("--out", type=Path, required=True, metavar="DIR", help="new folder for the adapters")
    add("--merge", type=Path, metavar="DIR", help="also write an export with the adapters in it")
    default = AdapterSettings()
    add("--rank", type=int, default=default.rank, help="rank of the adapters (%(default)s)")
    add("--alpha", type=float, help="their scale is alpha / rank (default: twice the rank)")
    add("--dropout", type=float, default=0.0, help="dropout before the adapters (%(default)s)")
    help_ = f"a matrix that is adapted; repeatable (default: {', '.join(TARGETS)})"
    add("--target", action="append", metavar="NAME", help=help_)
    help_ = "override any field of the configuration"
    add("overrides", nargs="*", metavar="section.key=value", help=help_)


def run(arguments: argparse.Namespace) -> None:
    """Learns adapters and writes them.

    Args:
        arguments: Of `add_command_line`.

    Raises:
        MdmError: Something does not fit, in one sentence; before anything starts where possible.
    """
    targets = tuple(dict.fromkeys(arguments.target or TARGETS))
    settings = AdapterSettings(arguments.rank, arguments.alpha, arguments.dropout, targets)
    for path, option in ((arguments.out, "--out"), (arguments.merge, "--merge")):
        if path is not None:
            check_new(path, option)
    quiet_engines()
    # Megatron-Core takes seconds to import.
    from megatron_mdm.hf.adapters.running import plan_run, train

    train(
        plan_run(arguments.model, arguments.config, settings, arguments.overrides),
        arguments.out,
        arguments.merge,
    )
