"""Compiled functions stay compiled, however many shapes and models a process sees."""

from __future__ import annotations

import torch
from torch._dynamo.testing import CompileCounter

from megatron_mdm.model.compilation import compile_function


def test_a_process_may_need_many_kernels_of_one_function(monkeypatch):
    kernels = CompileCounter()
    compile_now = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **options: compile_now(function, backend=kernels, **options),
    )
    double = compile_function(lambda x: x * 2, dynamic=False)
    for size in range(2, 14):
        assert double(torch.ones(size)).sum() == 2 * size
    assert kernels.frame_count == 12
