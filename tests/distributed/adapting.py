"""What ranks do in the tests of adapters: a few steps, and what became of the adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_mdm.config import check_layout, parse_config
from megatron_mdm.distributed.processes import start_process_group
from megatron_mdm.hf.adapters.model import AdaptedModel
from megatron_mdm.hf.adapters.settings import AdapterSettings
from megatron_mdm.hf.adapters.training import Record, learn_adapters
from megatron_mdm.training.data_plan import plan_data
from megatron_mdm.training.plan import RunPlan


def learn(folder: str, tree: dict[str, Any]) -> tuple[list[Record], list[Any]]:
    """Learns adapters; the records and the adapters of this rank."""
    device = torch.device("cpu")
    start_process_group(device)
    config = parse_config(tree)
    model = AdaptedModel(Path(folder), AdapterSettings(rank=2), seed=0, device=device)
    records: list[Record] = []
    layout = check_layout(config, dist.get_world_size())
    plan = RunPlan(config, layout, device, torch.float32, plan_data(config))
    learn_adapters(plan, model, records.append)
    return records, [np.asarray(one.detach()) for one in model.list_adapters()]
