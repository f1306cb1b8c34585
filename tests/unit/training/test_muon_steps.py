from __future__ import annotations

import math

import pytest
import torch

from megatron_mdm.config import ParameterGroups
from megatron_mdm.config.optimizer import CHOSEN_OPTIMIZER
from megatron_mdm.config.parameter_groups import OptimizedParameter, WholeParameters
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.training.muon import MuonConfig
from megatron_mdm.training.muon_steps import find_scale, orthogonalize
from megatron_mdm.training.optimizers import AdamWConfig, build_optimizer

SMALL = [[1.0, 2.0], [3.0, 4.0]]
TALL = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


def matrix_of(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def muon(parameters: list[OptimizedParameter], **settings) -> torch.optim.Optimizer:
    section = MuonConfig(**{"lr": 0.1, "min_lr": 0.0, "weight_decay": 0.1, **settings})
    optimizer = section.build(ParameterGroups(parameters, WholeParameters(parameters)))
    for one in parameters:
        role = one.role
        optimizer.state[one.tensor] = {
            name: state.to(one.tensor.dtype) if state.dim() else state
            for name, state in section.initial_state_of(role, one.tensor).items()
        }
    return optimizer


def parameter_of(values: torch.Tensor, role="hidden", **facts) -> OptimizedParameter:
    tensor = torch.nn.Parameter(values.clone())
    facts = {"name": role, "decays": role != "vector", "shape": tuple(values.shape)} | facts
    return OptimizedParameter(role=role, tensor=tensor, **facts)


# Published goldens of five quintic iterations in float64.
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (SMALL, [[-0.680661, 0.825540], [0.741295, 0.259440]]),
        (TALL, [[-0.467519, 0.573473], [0.072432, 0.409453], [0.612383, 0.245432]]),
    ],
)
def test_five_quintic_iterations_give_known_values(rows, expected):
    found = orthogonalize(matrix_of(rows), 5, "quintic")
    torch.testing.assert_close(found, matrix_of(expected), atol=5e-7, rtol=0)
    # The other orientation is the same problem.
    turned = orthogonalize(matrix_of(rows).T, 5, "quintic")
    torch.testing.assert_close(turned, found.T)


def test_the_exact_factor_is_what_the_iterations_are_near():
    left, _, right = torch.linalg.svd(matrix_of(SMALL))
    exact = left @ right
    expected = matrix_of([[-0.514496, 0.857493], [0.857493, 0.514496]])
    torch.testing.assert_close(exact, expected, atol=5e-7, rtol=0)
    # Iterations end where the last polynomial does, a little above 1.
    found = orthogonalize(matrix_of(SMALL), 12, "polar_express")
    torch.testing.assert_close(found / found[0].norm(), exact, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("coefficients", "low", "high"), [("quintic", 0.68, 1.21), ("polar_express", 0.85, 1.15)]
)
def test_five_iterations_bring_singular_values_near_1(coefficients, low, high):
    generator = torch.Generator().manual_seed(1)
    left, right = (
        torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64, generator=generator))[0]
        for _ in range(2)
    )
    values = torch.logspace(-2, 0, 40, dtype=torch.float64)
    found = orthogonalize(left @ torch.diag(values) @ right, 5, coefficients)
    # Directions stay, values do not.
    stayed = left.T @ found @ right.T
    assert (stayed - torch.diag(stayed.diag())).abs().max() < 1e-12
    assert ((stayed.diag() > low) & (stayed.diag() < high)).all()


@pytest.mark.parametrize("averages", [True, False], ids=["averaged", "summed"])
def test_two_steps_give_known_values_in_both_forms_of_momentum(averages):
    """M = mu M + (1 - mu) G is the package's; M = mu M + G has the same direction."""
    parameter = parameter_of(torch.eye(2, dtype=torch.float64))
    optimizer = muon([parameter])
    weight, momentum = parameter.tensor, torch.zeros(2, 2, dtype=torch.float64)
    by_hand = torch.eye(2, dtype=torch.float64)
    for rows in (SMALL, [[0.0, 1.0], [1.0, 0.0]]):
        grad = matrix_of(rows)
        weight.grad = grad.clone()
        optimizer.step()
        momentum = 0.95 * momentum + (0.05 if averages else 1.0) * grad
        direction = 0.95 * momentum + (0.05 if averages else 1.0) * grad
        by_hand *= 1 - 0.1 * 0.1
        by_hand -= 0.1 * 0.2 * math.sqrt(2) * orthogonalize(direction, 5, "quintic")
    expected = matrix_of([[1.011708, -0.048751], [-0.044554, 0.969475]])
    torch.testing.assert_close(weight.detach(), expected, atol=5e-7, rtol=0)
    # The norm's 1e-7 weighs more where momentum is a twentieth.
    torch.testing.assert_close(by_hand, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("scale", "theirs"), [("moonlight", "match_rms_adamw"), ("keller", "original")]
)
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_pytorch_to_its_bfloat16(scale, theirs, nesterov):
    generator = torch.Generator().manual_seed(2)
    before = torch.randn(12, 7, generator=generator)
    mine, other = parameter_of(before), torch.nn.Parameter(before.clone())
    optimizer = muon([mine], scale=scale, nesterov=nesterov)
    reference = torch.optim.Muon(
        [other], lr=0.1, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=theirs
    )
    for _ in range(4):
        grad = torch.randn(12, 7, generator=generator)
        mine.tensor.grad, other.grad = grad.clone(), grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(mine.tensor, other, atol=1e-2, rtol=0)
    assert (mine.tensor - before).abs().max() > 0.1


def test_scales_are_those_of_their_papers():
    assert find_scale((30, 40), "moonlight") == pytest.approx(0.2 * math.sqrt(40))
    assert find_scale((40, 30), "keller") == pytest.approx(math.sqrt(4 / 3))
    assert find_scale((30, 40), "keller") == 1.0


QKV = ((0, 4), (1, 2), (2, 2)) * 2


@pytest.mark.parametrize("splits", [True, False])
def test_queries_keys_and_values_of_all_groups_are_matrices_of_their_own(splits):
    generator = torch.Generator().manual_seed(3)
    before, grad = torch.randn(2, 16, 6, dtype=torch.float64, generator=generator)
    qkv = parameter_of(before, rows=QKV, matrices=("query", "key", "value"))
    optimizer = muon([qkv], split_qkv=splits, weight_decay=0.0)
    qkv.tensor.grad = grad.clone()
    optimizer.step()
    split = [[*range(4), *range(8, 12)], [4, 5, 12, 13], [6, 7, 14, 15]]
    for matrix in split if splits else [[*range(16)]]:
        step = orthogonalize(grad[matrix], 5, "quintic") * 0.2 * math.sqrt(max(len(matrix), 6))
        # Beside the norm of the first direction, a tenth of the gradient's, 1e-7 counts for more.
        expected = before[matrix] - 0.1 * step
        torch.testing.assert_close(qkv.tensor[matrix], expected, atol=1e-6, rtol=0)


def test_gate_and_up_projection_are_split_by_their_own_field():
    fused = parameter_of(torch.eye(4), rows=((0, 2), (1, 2)), matrices=("gate", "up"))
    assert MuonConfig().splits(fused)
    assert MuonConfig(split_qkv=False).splits(fused)
    assert not MuonConfig(split_gate_up=False).splits(fused)
    assert not MuonConfig().splits(parameter_of(torch.eye(4)))


def test_all_but_hidden_matrices_take_the_steps_of_adamw_at_their_own_rates():
    generator = torch.Generator().manual_seed(4)
    factors = {"embedding": 0.5, "output": 2.0, "vector": 3.0}
    for role, factor in factors.items():
        shape = (5,) if role == "vector" else (5, 3)
        before = torch.randn(shape, generator=generator)
        mine, other = parameter_of(before, role), torch.nn.Parameter(before.clone())
        chosen = {f"{name}_lr_factor": value for name, value in factors.items()}
        optimizer = muon([mine], beta1=0.8, beta2=0.95, eps=1e-10, **chosen)
        reference = AdamWConfig(
            lr=0.1 * factor, min_lr=0.0, beta1=0.8, beta2=0.95, eps=1e-10, weight_decay=0.1
        )
        theirs = build_optimizer(torch.nn.ParameterList([other]), reference)
        for _ in range(3):
            grad = torch.randn(shape, generator=generator)
            mine.tensor.grad, other.grad = grad.clone(), grad.clone()
            optimizer.step()
            theirs.step()
        assert torch.equal(mine.tensor, other), role
        assert optimizer.state[mine.tensor]["step"] == 3


def test_a_step_without_gradients_changes_nothing():
    parameters = [parameter_of(torch.eye(3)), parameter_of(torch.ones(3), "vector")]
    optimizer = muon(parameters)
    optimizer.step()
    assert torch.equal(parameters[0].tensor, torch.eye(3))
    assert optimizer.state[parameters[1].tensor]["step"] == 0


def test_of_hidden_matrices_one_state_is_kept_and_of_the_others_two():
    section = MuonConfig()
    assert section.list_state_names("hidden") == ["momentum_buffer"]
    assert section.list_state_names("embedding") == ["exp_avg", "exp_avg_sq"]
    assert section.list_all_state_names() == ["momentum_buffer", "exp_avg", "exp_avg_sq"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"kind": "adamw", "ns_steps": 3}, "optimizer.ns_steps belongs to optimizer.kind=muon"),
        ({"kind": "moun"}, "did you mean muon?"),
        ({"kind": "muon", "min_lr": 1.0}, "optimizer.min_lr=1.0 is greater than optimizer.lr"),
        ({"kind": "muon", "scale": "spectral"}, "'moonlight' or 'keller'"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(fields, told):
    with pytest.raises((ConfigError, ValueError), match=told):
        CHOSEN_OPTIMIZER.read(fields)
