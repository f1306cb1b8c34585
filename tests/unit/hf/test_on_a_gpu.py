"""An exported model on a GPU: no operation mixes devices, and its texts are those of the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from exported_code import MASK, random_model
from pretend_gpu import GpuTensor, move, pretended_gpu

from megatron_mdm.inference.passes import Guidance, Passes, judge_with

PROMPTS = torch.tensor([[3, 5, 1, 7, 2], [11, 4, 18, 0, 6]])
REAL = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
BLOCKS = {"max_new_tokens": 8, "num_steps": 4, "block_length": 4}
GENERATIONS: list[dict[str, Any]] = [
    *(
        {"order": order, "temperature": 0.7, "top_k": 5, "top_p": 0.9}
        for order in ("confidence", "margin", "entropy", "random", "ancestral", "left_to_right")
    ),
    {"order": "confidence", "temperature": 0.0, "guidance_scale": 0.5},
    {"order": "margin", "temperature": 1.0, "use_cache": True, "cache_refresh_steps": 2},
    {"order": "random", "remasking": 0.3, "end_token_id": 3},
    {"order": "entropy", "threshold": 0.5},
]


def test_mixed_devices_are_found(monkeypatch):
    with pretended_gpu(monkeypatch) as to_gpu:
        ones = torch.ones(2, 3, device="cuda")
        assert isinstance(ones + to_gpu(torch.ones(3)) * 2, GpuTensor)
        assert (ones.sum() + 1).item() == 7
        with pytest.raises(RuntimeError, match="mixes tensors"):
            ones + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            ones.numpy()


@pytest.mark.parametrize("options", GENERATIONS, ids=lambda options: "-".join(map(str, options)))
def test_masks_are_filled_as_on_the_cpu(monkeypatch, options):
    expected = random_model().generate(PROMPTS, REAL, generation_config=BLOCKS | options)
    model = move(random_model())
    with pretended_gpu(monkeypatch) as to_gpu:
        found = model.generate(to_gpu(PROMPTS), to_gpu(REAL), generation_config=BLOCKS | options)
    assert torch.equal(found.host, expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_are_continued_as_on_the_cpu(monkeypatch, temperature):
    options = {"max_new_tokens": 6, "temperature": temperature, "end_token_id": 2}
    expected = random_model(is_causal=True).generate(PROMPTS, REAL, generation_config=options)
    model = move(random_model(is_causal=True))
    with pretended_gpu(monkeypatch) as to_gpu:
        found = model.generate(to_gpu(PROMPTS), to_gpu(REAL), generation_config=options)
    assert torch.equal(found.host, expected)


@pytest.mark.parametrize("is_guided", [False, True])
def test_tokens_are_judged_as_on_the_cpu(monkeypatch, is_guided):
    tokens_RS = np.tile(np.arange(8), (3, 1))
    tokens_RS[:, 3:5] = MASK
    passes = Passes(
        tokens_RS,
        np.array([8, 8, 8] if is_guided else [8, 6, 7]),
        tokens_RS == MASK,
        rows_N=np.array([0, 0, 1, 2]),
        columns_N=np.array([3, 4, 3, 4]),
        targets_N=np.array([1, 2, 3, 4]),
        guidance=Guidance(np.full((1, 8), MASK), np.zeros(3, int), 0.5) if is_guided else None,
    )
    expected = judge_with(random_model(), passes)
    model = move(random_model())
    with pretended_gpu(monkeypatch):
        found = judge_with(model, passes)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
