from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_mdm.config.optimizer import CHOSEN_OPTIMIZER
from megatron_mdm.config.schedule import CHOSEN_SCHEDULE
from megatron_mdm.training.optimizers import AdamWConfig, Rates, build_optimizer


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


def factors(num_steps: int, **fields) -> list[float]:
    schedule = CHOSEN_SCHEDULE.read({"steps": num_steps, "weight_decay": fields})
    return [schedule.weight_decay.factor(step, num_steps) for step in range(num_steps)]


def points_of(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    return [{"at": at, "factor": factor} for at, factor in pairs]


def test_weight_decay_is_constant_unless_it_is_said_otherwise():
    assert factors(4) == factors(4, kind="constant") == [1.0] * 4


def test_weight_decay_is_held_then_goes_in_lines_from_point_to_point():
    points = points_of((0.4, 1.0), (0.8, 0.5), (1.0, 1.5))
    found = factors(10, kind="piecewise", points=points)
    expected = [1, 1, 1, 1, 0.875, 0.75, 0.625, 0.5, 1.0, 1.5]
    assert found == pytest.approx(expected, rel=1e-12)


def test_two_points_at_one_share_are_a_jump():
    """As of decay that rises anew in each of the last epochs."""
    points = points_of((0.5, 1.0), (0.5, 0.65), (0.75, 1.5), (0.75, 0.65), (1.0, 1.5))
    found = factors(8, kind="piecewise", points=points)
    assert found == pytest.approx([1, 1, 1, 1, 1.075, 1.5, 1.075, 1.5], rel=1e-12)
    assert factors(4, kind="piecewise", points=points_of((0.5, 0.0))) == [0.0] * 4


@pytest.mark.parametrize(
    ("points", "told"),
    [
        (points_of((0.7, 1.0), (0.4, 2.0)), "go back from at=0.7 to at=0.4: put them in the order"),
        ([], "at least 1 item"),
        (points_of((1.5, 1.0)), "less than or equal to 1"),
        (points_of((0.5, -1.0)), "greater than or equal to 0"),
    ],
)
def test_points_that_make_no_schedule_are_refused(points, told):
    with pytest.raises(ValueError, match=told):
        factors(4, kind="piecewise", points=points)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_optimizer_decays_by_the_factor_of_the_step_where_it_decays(kind):
    module = nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4))
    section = CHOSEN_OPTIMIZER.read({"kind": kind, "lr": 0.5, "weight_decay": 0.25})
    optimizer = build_optimizer(module, section)
    rates = Rates(optimizer.param_groups)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for factor in (2.0, 0.0, 1.0):
        rates.set(0.5, factor)
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    decayed = before["0.weight"] * (1 - 0.5 * 0.5) * (1 - 0.5 * 0.25)
    torch.testing.assert_close(module[0].weight.detach(), decayed)
    for name in ("0.bias", "1.weight"):
        assert torch.equal(module.state_dict()[name], before[name])


def test_groups_that_know_no_weight_decay_are_left_alone():
    groups = [{"params": [], "lr": 1.0}]
    Rates(groups).set(0.5, 2.0)
    assert groups == [{"params": [], "lr": 0.5}]
