from __future__ import annotations

import torch
from torch import nn

from megatron_mdm.training.optimizers import AdamWConfig, build_optimizer


def test_only_matrices_decay():
    module = nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    optimizer = build_optimizer(module, AdamWConfig(lr=0.5, weight_decay=0.25))
    for parameter in module.parameters():
        # Adam itself makes no step of this.
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in module.state_dict().items():
        expected = before[name] * (1 - 0.5 * 0.25) if name == "0.weight" else before[name]
        torch.testing.assert_close(value, expected)
