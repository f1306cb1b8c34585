from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mdm.checkpoint.flat_tensors import FlatTensor

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def parameter_of(numel: int) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.zeros(numel))
    # ZeRO-3 keeps the size so.
    parameter.ds_numel = numel
    return parameter


@pytest.mark.parametrize("zero_stage", [1, 3])
@given(sizes=SIZES, num_replicas=st.integers(1, 7))
def test_replicas_hold_every_element_once(zero_stage, sizes, num_replicas):
    parameters = [parameter_of(size) for size in sizes]
    part = -(-sum(sizes) // num_replicas)
    if zero_stage == 3:
        part = sum(-(-size // num_replicas) for size in sizes)
    flat = FlatTensor(torch.zeros(part), parameters, zero_stage)
    seen = [torch.zeros(size, dtype=torch.int64) for size in sizes]
    for replica in range(num_replicas):
        end = 0
        for place, start, numel, offset in flat.list_extents(replica, num_replicas):
            assert numel > 0
            assert end <= offset
            end = offset + numel
            seen[place][start : start + numel] += 1
        assert end <= part
    assert all((counts == 1).all() for counts in seen)


def test_without_zero_each_replica_holds_all():
    parameter = parameter_of(6)
    flat = FlatTensor(parameter, [parameter], 0)
    assert flat.list_extents(0, 3) == flat.list_extents(2, 3) == [(0, 0, 6, 0)]


def test_zero_1_cuts_parameters_one_after_another():
    flat = FlatTensor(torch.zeros(5), [parameter_of(3), parameter_of(6)], 1)
    assert flat.list_extents(0, 2) == [(0, 0, 3, 0), (1, 0, 2, 3)]
    assert flat.list_extents(1, 2) == [(1, 2, 4, 0)]


def test_zero_3_cuts_each_parameter():
    flat = FlatTensor(torch.zeros(5), [parameter_of(3), parameter_of(6)], 3)
    assert flat.list_extents(0, 2) == [(0, 0, 2, 0), (1, 0, 3, 2)]
    # The last one's parts are filled up.
    assert flat.list_extents(1, 2) == [(0, 2, 1, 0), (1, 3, 3, 2)]
