"""The command line of mdm lora."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from megatron_mdm.core.quiet import quiet_engines
from megatron_mdm.hf.adapters.saving import check_new
from megatron_mdm.hf.adapters.settings import TARGETS, AdapterSettings


def finetune(
    *overrides: Annotated[str, Parameter(help="Fields of the configuration, section.key=value.")],
    model: Path,
    config: Path,
    out: Path,
    merge: Path | None = None,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target: Annotated[list[str] | None, Parameter(consume_multiple=False)] = None,
) -> None:
    """Learns adapters and writes them.

    Args:
        *overrides: Fields of the configuration, as section.key=value.
        model: The folder of the exported model.
        config: YAML file, as for mdm finetune.
        out: A new folder for the adapters.
        merge: A new folder for an export with the adapters in it.
        rank: Rank of the adapters.
        alpha: Their scale is alpha / rank; by default twice the rank.
        dropout: Dropout before the adapters.
        target: A matrix that is adapted; repeatable. By default all of a block: q_proj, k_proj,
            v_proj, o_proj, gate_proj, up_proj, down_proj.

    Raises:
        MdmError: Something does not fit, in one sentence; before anything starts where possible.
    """
    settings = AdapterSettings(rank, alpha, dropout, tuple(dict.fromkeys(target or TARGETS)))
    for path, option in ((out, "--out"), (merge, "--merge")):
        if path is not None:
            check_new(path, option)
    quiet_engines()
    # Megatron-Core takes seconds to import.
    from megatron_mdm.hf.adapters.running import plan_run, train

    train(plan_run(model, config, overrides), model, settings, out, merge)
