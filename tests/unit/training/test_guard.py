from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mdm.config import FaultsConfig
from megatron_mdm.core.errors import BadStepsError
from megatron_mdm.training.guard import StepGuard, finite_or_nan

SPIKES = FaultsConfig(max_skipped_steps=3, loss_spike_factor=2.0)


def fed(guard: StepGuard, losses: list[float]) -> list[bool]:
    decisions = []
    for loss in losses:
        accepted = guard.accepts(loss) and math.isfinite(loss)
        guard.count(accepted, loss)
        decisions.append(accepted)
    return decisions


def test_a_spike_is_skipped_after_100_accepted_steps_and_leaves_the_average_alone():
    guard = StepGuard(SPIKES, 0, 0, None)
    assert all(fed(guard, [1.0, 9.0] + [1.0] * 98))
    # Weighted by hand: the first loss starts the average, 9 is 98 steps old.
    assert guard.loss_average == pytest.approx(1 + 8 * 0.01 * 0.99**98)
    before = guard.loss_average
    assert fed(guard, [2 * before + 1e-9, 2 * before]) == [False, True]
    assert guard.num_skipped == 1
    assert guard.loss_average == pytest.approx(0.99 * before + 0.01 * 2 * before)


@given(
    st.lists(st.sampled_from([0.5, 1.0, 1.9, 3.0, 7.0, math.nan, math.inf]), max_size=150),
    st.integers(0, 150),
)
def test_a_guard_restored_from_a_checkpoint_decides_as_the_one_that_was_saved(losses, cut):
    losses = [1.0] * 95 + losses
    cut = min(cut, len(losses))
    whole, first = StepGuard(SPIKES, 0, 0, None), StepGuard(SPIKES, 0, 0, None)
    decisions = fed(first, losses[:cut])
    second = StepGuard(SPIKES, cut - first.num_skipped, first.num_skipped, first.loss_average)
    assert decisions + fed(second, losses[cut:]) == fed(whole, losses)
    assert (second.loss_average, second.num_skipped) == (whole.loss_average, whole.num_skipped)


def test_only_skipped_steps_in_a_row_end_a_run():
    guard = StepGuard(FaultsConfig(max_skipped_steps=3), 0, 0, None)
    for is_applied in [False, False, True, False, False]:
        guard.count(is_applied, None)
        guard.check(7, "loss nan")
    guard.count(False, None)
    with pytest.raises(
        BadStepsError, match=r"^The last 3 steps up to step 7 .*\(the last: loss nan"
    ):
        guard.check(7, "loss nan")
    assert guard.num_skipped == 5
    assert guard.loss_average is None


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (math.nan, "loss nan"),
        (math.inf, "loss inf"),
        (1.0, "gradient norm inf"),
        (3.0, "loss 3.0000 over 2 times its average 1.0000"),
    ],
)
def test_a_skipped_step_says_why(loss, reason):
    guard = StepGuard(SPIKES, 100, 0, 1.0)
    assert guard.reason(loss, math.inf) == reason


def test_a_loss_that_is_not_finite_has_no_finite_gradient():
    logits = torch.zeros(4, requires_grad=True)
    target = torch.tensor(0)

    def of_the_masked_token():
        masked = logits.masked_fill(torch.tensor([True, False, False, False]), -math.inf)
        return torch.nn.functional.cross_entropy(masked, target)

    loss = of_the_masked_token()
    assert math.isinf(loss.item())
    assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()
    loss = finite_or_nan(of_the_masked_token())
    assert not math.isfinite(loss.item())
    assert torch.isnan(torch.autograd.grad(loss, logits)[0]).any()

    finite = [torch.nn.functional.cross_entropy(logits, target) for _ in range(2)]
    assert torch.equal(finite_or_nan(finite[0]), finite[0])
    (expected,) = torch.autograd.grad(finite[0], logits)
    assert torch.equal(torch.autograd.grad(finite_or_nan(finite[1]), logits)[0], expected)
