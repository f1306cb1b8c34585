"""Objectives of made-up runs."""

from __future__ import annotations

from typing import Any

from megatron_mdm.config import FinetuningConfig
from megatron_mdm.config.objective import CHOSEN_OBJECTIVE, RunFacts
from megatron_mdm.diffusion.absorbing import AbsorbingConfig
from megatron_mdm.diffusion.samples import Objective


def build_objective(
    *,
    seed: int = 0,
    global_batch_size: int = 8,
    mask_token_id: int,
    finetuning: FinetuningConfig | None = None,
    **fields: Any,
) -> Objective:
    """Builds an objective from fields of its section and of its forward process."""
    process = {
        name: fields.pop(name)
        for name in list(fields)
        if name != "kind" and name in AbsorbingConfig.model_fields
    }
    section = CHOSEN_OBJECTIVE.read({**fields, "process": process})
    facts = RunFacts(seed, global_batch_size, mask_token_id, mask_token_id)
    return section.build(facts._replace(finetuning=finetuning or FinetuningConfig()))
