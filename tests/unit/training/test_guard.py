from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mdm.config import FaultsConfig
from megatron_mdm.core.errors import BadStepsError
from megatron_mdm.training.guard import StepGuard

SPIKES = FaultsConfig(max_skipped_steps=3, loss_spike_factor=2.0)


class Steps:
    """A run whose losses are given.

    Args:
        guard: Its guard.
        step: Steps taken before.
        num_skipped: Steps among them that were left out.
    """

    def __init__(self, guard: StepGuard, step: int = 0, num_skipped: int = 0) -> None:
        self.step, self.num_skipped = step, num_skipped
        self.said: list[str] = []
        self.plan = SimpleNamespace(num_steps=500)
        self.result = None
        self._guard = guard

    def take(self, loss: float, grad_norm: float = 1.0) -> bool:
        """Takes a step; returns whether its update was made."""
        self.mean_loss = lambda: loss
        is_applied = self._guard.accepts_update(self) and math.isfinite(loss + grad_norm)
        self.result = SimpleNamespace(is_applied=is_applied, grad_norm=grad_norm)
        self.step += 1
        self.num_skipped += not is_applied
        self._guard.after_step(self)
        return is_applied

    def say(self, line: str) -> None:
        self.said.append(line)


def test_a_spike_is_skipped_after_100_accepted_steps_and_leaves_the_average_alone():
    guard = StepGuard(SPIKES)
    steps = Steps(guard)
    assert all(steps.take(loss) for loss in [1.0, 9.0] + [1.0] * 98)
    # Weighted by hand: the first loss starts the average, 9 is 98 steps old.
    assert guard.loss_average == pytest.approx(1 + 8 * 0.01 * 0.99**98)
    before = guard.loss_average
    assert [steps.take(2 * before + 1e-9), steps.take(2 * before)] == [False, True]
    assert steps.num_skipped == 1
    assert guard.loss_average == pytest.approx(0.99 * before + 0.01 * 2 * before)


@given(
    st.lists(st.sampled_from([0.5, 1.0, 1.9, 3.0, 7.0, math.nan, math.inf]), max_size=150),
    st.integers(0, 150),
)
def test_a_guard_restored_from_a_checkpoint_decides_as_the_one_that_was_saved(losses, cut):
    losses = [1.0] * 95 + losses
    cut = min(cut, len(losses))
    limits = SPIKES.model_copy(update={"max_skipped_steps": 500})
    whole, first, second = StepGuard(limits), StepGuard(limits), StepGuard(limits)
    before, alone = Steps(first), Steps(whole)
    decisions = [before.take(loss) for loss in losses[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    after = Steps(second, before.step, before.num_skipped)
    decisions += [after.take(loss) for loss in losses[cut:]]
    assert decisions == [alone.take(loss) for loss in losses]
    assert (second.loss_average, after.num_skipped) == (whole.loss_average, alone.num_skipped)


def test_only_skipped_steps_in_a_row_end_a_run():
    guard = StepGuard(FaultsConfig(max_skipped_steps=3))
    steps = Steps(guard, step=1)
    assert [steps.take(loss) for loss in (math.nan, math.nan, 1.0, math.nan, math.nan)] == [
        *(False, False, True, False, False)
    ]
    with pytest.raises(
        BadStepsError, match=r"^The last 3 steps up to step 7 .*\(the last: loss nan"
    ):
        steps.take(math.nan)
    assert steps.num_skipped == 5
    assert guard.loss_average is None


@pytest.mark.parametrize(
    ("loss", "grad_norm", "reason"),
    [
        (math.nan, 1.0, "loss nan"),
        (math.inf, 1.0, "loss inf"),
        (1.0, math.inf, "gradient norm inf"),
        (3.0, 1.0, "loss 3.0000 over 2 times its average 1.0000"),
    ],
)
def test_a_skipped_step_says_why(loss, grad_norm, reason):
    guard = StepGuard(SPIKES)
    guard.load_state_dict({"loss_average": 1.0})
    steps = Steps(guard, step=100)
    assert not steps.take(loss, grad_norm)
    assert steps.said == [f"step  101/500 | skipped ({reason})"]
