"""Norm, rotary embedding and activations against their formulas, values and gradients."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from megatron_mdm.model.elementwise import (
    Rotation,
    rms_norm,
    rotate,
    split_rms_norm,
    squared_relu,
    swiglu,
)

CPU = torch.device("cpu")


def saved_elements(run, *inputs):
    """Numbers that the backward pass of run(*inputs) keeps, beside the inputs themselves."""
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run(*inputs)
    assert result.requires_grad
    return sum(found.values())


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(5, 2, 6), (1, 1, 6), (0, 2, 6)])
def test_a_norm_is_its_formula(shape):
    x, w = double(*shape), double(6)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w
    torch.testing.assert_close(rms_norm(x, w, 1e-3), expected)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, w))


def test_a_norm_takes_rows_with_strides():
    x, w = double(6, 3, 4), double(6)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x.permute(2, 1, 0), w, 1e-3), (x, w))


def test_a_norm_of_zeros_has_a_gradient():
    x = torch.zeros(2, 4, requires_grad=True)
    rms_norm(x, torch.ones(4), 1e-5).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2, 4), 1 / math.sqrt(1e-5)))


def test_half_precision_norms_round_once():
    x, w = torch.randn(7, 64, dtype=torch.bfloat16), torch.randn(64, dtype=torch.bfloat16)
    exact = F.rms_norm(x.double(), (64,), w.double(), 1e-5)
    assert ((rms_norm(x, w, 1e-5).double() - exact).abs() <= exact.abs() * 2**-8 + 1e-30).all()


def test_a_norm_of_divided_rows_is_that_of_the_whole():
    # Another rank holds 4 columns whose squares add up to 6 in each row.
    x, w = double(5, 2, 6), double(6)

    def run(x, w):
        return split_rms_norm(x, w, 1e-3, width=10, sum_over_ranks=lambda sums: sums + 6)

    expected = x / ((x.square().sum(-1, keepdim=True) + 6) / 10 + 1e-3).sqrt() * w
    torch.testing.assert_close(run(x, w), expected)
    narrow = run(x.bfloat16(), w.bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.double(), expected, atol=0.03, rtol=0.03)


def test_a_squared_relu_is_its_formula():
    x = double(3, 2, 8)
    torch.testing.assert_close(squared_relu(x), torch.where(x > 0, x * x, 0.0))
    assert torch.autograd.gradcheck(squared_relu, (x,))


@pytest.mark.parametrize("shape", [(3, 2, 8), (2, 2)])
def test_swiglu_is_its_formula(shape):
    x = double(*shape)
    gate, value = x.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(x), gate * torch.sigmoid(gate) * value)
    assert torch.autograd.gradcheck(swiglu, (x,))


def test_a_rotation_turns_each_pair_by_position_times_frequency():
    rotation = Rotation.build(7, 4, 100.0, CPU)
    x = torch.randn(7, 1, 1, 4)
    found = rotate(x, rotation)
    for position in range(7):
        for pair, frequency in enumerate((1.0, 0.1)):  # 100^0 and 100^(-2 / 4)
            before = complex(*x[position, 0, 0, [pair, pair + 2]])
            after = before * complex(math.cos(position * frequency), math.sin(position * frequency))
            real, imaginary = found[0, 0, position, [pair, pair + 2]].tolist()
            assert complex(real, imaginary) == pytest.approx(after, abs=1e-6)


def test_a_rotation_brings_heads_forward_and_has_its_gradient():
    cos, sin = (table.double() for table in Rotation.build(5, 6, 10.0, CPU))
    x = double(5, 2, 3, 6)
    out = rotate(x, Rotation(cos, sin))
    assert out.shape == (2, 3, 5, 6)
    assert out.is_contiguous()
    assert torch.autograd.gradcheck(lambda x: rotate(x, Rotation(cos, sin)), (x,))


def test_products_of_rotated_vectors_depend_on_the_distance_alone():
    rotation = Rotation.build(40, 8, 10000.0, CPU)
    q, k = torch.randn(2, 8)
    q_SD, k_SD = (rotate(v.expand(40, 1, 1, 8), rotation)[0, 0] for v in (q, k))
    scores_SS = q_SD @ k_SD.T
    for distance in (-20, 0, 3):
        diagonal = scores_SS.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)


def test_a_rotation_serves_shorter_sequences_and_half_precision():
    rotation = Rotation.build(9, 8, 10000.0, CPU).take_first(4)
    x = torch.randn(4, 1, 2, 8, dtype=torch.bfloat16)
    exact = rotate(x.float(), rotation)
    assert rotate(x, rotation).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(x, rotation), exact.bfloat16(), atol=0, rtol=0)


def test_only_inputs_are_kept():
    x, w = torch.randn(5, 3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    assert saved_elements(swiglu, x) == saved_elements(squared_relu, x) == 0
    assert saved_elements(lambda x, w: rms_norm(x, w, 1e-5), x, w) == 15
    rotation = Rotation.build(5, 8, 10000.0, CPU)
    y = torch.randn(5, 2, 3, 8, requires_grad=True)
    tables = 2 * 5 * 4
    assert saved_elements(lambda y: rotate(y, rotation), y) == tables


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_kernels_compute_the_same_for_several_lengths():
    rotation = Rotation.build(9, 8, 10000.0, CPU)

    def run(length: int, compiled: bool):
        torch.manual_seed(length)
        x, y = (torch.randn(length, 2, *s, requires_grad=True) for s in ((3, 8), (16,)))
        h, w = torch.randn(length, 2, 8, requires_grad=True), torch.rand(8, requires_grad=True)
        results = (
            rotate(x, rotation.take_first(length), compiled=compiled),
            swiglu(y, compiled=compiled),
            squared_relu(y, compiled=compiled),
            rms_norm(h, w, 1e-5, compiled=compiled),
        )
        sum(result.square().sum() for result in results).backward()
        return [*results, x.grad, y.grad, h.grad, w.grad]

    for length in (9, 5, 7):
        torch.testing.assert_close(run(length, True), run(length, False))
