"""What blocks make of samples that pass some of them by, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from cases import Overrides, batches_of, stage_of
from numpy.typing import NDArray
from torch import Tensor

from megatron_mdm.diffusion.samples import BLOCK_SCALES
from megatron_mdm.diffusion.stochastic_depth import build_stochastic_depth

Pattern = tuple[bool, ...]


@torch.no_grad()
def outputs_of_blocks(overrides: Overrides) -> dict[str, Any]:
    """Hidden states behind each block for every choice of blocks that are passed by.

    Args:
        overrides: As for `config_of`.

    Returns:
        `outputs`: by the choices up to a block (True: it stays), what is behind it. `whole`: the
        same where a block that follows such choices is not scaled. `plain`, `evaluated`: behind
        the last block without choices, and in evaluation with them. `rates`: of the blocks.
    """
    with stage_of(overrides) as stage:
        model = stage.model.double()
        batch = batches_of(stage.config, 0, 1).read_step(0)[0]
        inputs_BS = torch.from_numpy(batch.inputs_BS)
        depth = build_stochastic_depth(stage.config)
        assert depth is not None
        seen: list[NDArray[np.float64]] = []

        def record(_: Any, __: Any, result: tuple[Tensor, Any]) -> None:
            seen.append(result[0].numpy().copy())

        for layer in model.decoder.layers:
            layer.register_forward_hook(record)

        def run(scales: list[float] | None) -> list[NDArray[np.float64]]:
            seen.clear()
            more = {}
            if scales is not None:
                more[BLOCK_SCALES] = torch.tensor(scales, dtype=torch.float64).expand(
                    len(inputs_BS), -1
                )
            model(inputs_BS, model_inputs=more)
            return list(seen)

        stays = (1.0 / (1.0 - depth.rates_L)).tolist()
        outputs: dict[Pattern, NDArray[np.float64]] = {}
        whole: dict[Pattern, NDArray[np.float64]] = {}
        for pattern in itertools.product((False, True), repeat=depth.num_layers):
            scales = [scale * kept for scale, kept in zip(stays, pattern, strict=True)]
            for block, found in enumerate(run(scales)):
                outputs[pattern[: block + 1]] = found
            for block in range(depth.num_layers):
                one = [*scales[:block], 1.0, *scales[block + 1 :]]
                whole[pattern[:block]] = run(one)[block]
        plain = run(None)[-1]
        model.eval()
        evaluated = run([0.0] * depth.num_layers)[-1]
        return {
            "outputs": outputs,
            "whole": whole,
            "plain": plain,
            "evaluated": evaluated,
            "rates": depth.rates_L,
        }
