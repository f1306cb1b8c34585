from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_mdm.model import layers


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="tests its absence")
def test_a_gpu_without_transformer_engine_gets_megatrons_linears():
    # Megatron-Core puts mocks in the place of a missing Transformer Engine.
    on_gpu = SimpleNamespace(use_cpu_initialization=False)
    assert layers._choose_linear_classes(on_gpu) == (ColumnParallelLinear, RowParallelLinear)
