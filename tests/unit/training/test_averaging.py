"""Averages of the weights: their arithmetic, the moments of a run, and what is refused."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mdm.config import parse_config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.training.average_hooks import ExponentialAverage, UniformAverage
from megatron_mdm.training.averaging import (
    ExponentialAverageConfig,
    UniformAverageConfig,
    find_decay,
)
from megatron_mdm.training.hook_list import build_own_hooks
from megatron_mdm.training.plan import find_missing_space, make_plan


class Weights:
    """A run whose weights are one number, and whose epochs are three and a half steps long."""

    def __init__(self, num_steps: int = 14, first_step: int = 0) -> None:
        self.step = first_step
        self.weight = torch.zeros(1)
        self.result = SimpleNamespace(is_applied=True)
        self.plan = SimpleNamespace(
            num_steps=num_steps, data=SimpleNamespace(train=SimpleNamespace(num_windows=28))
        )
        self.config = SimpleNamespace(
            batch=SimpleNamespace(global_batch_size=8), data=SimpleNamespace(seq_length=4)
        )
        self.engine = SimpleNamespace(states=SimpleNamespace(list_pieces=lambda: [self.weight]))
        self.said: list[str] = []
        self.say = self.said.append

    def take(self, hook: Any, steps: int, skipped: tuple[int, ...] = ()) -> float:
        """Steps whose weights are their numbers; a skipped one keeps those before."""
        for step in range(self.step + 1, self.step + steps + 1):
            self.step, self.result.is_applied = step, step not in skipped
            if self.result.is_applied:
                self.weight.fill_(float(step))
            hook.after_step(self)
        return float(hook.weight_states()[hook.name].pieces[0])


def exponential(decay: float, **fields: Any) -> ExponentialAverage:
    """An average whose steps keep such a share."""
    section = ExponentialAverageConfig.model_construct(
        **{"name": "ema", "validated": True, "warm": False, "kind": "ema", **fields},
        horizon_tokens=-1 / math.log(decay),
    )
    return ExponentialAverage(section, step_tokens=1)


def begun(hook: Any, run: Weights, state: dict[str, Any] | None = None) -> Any:
    hook.begin(run)
    if state is not None:
        hook.load_state_dict(json.loads(json.dumps(state)))
    return hook


def test_the_exponential_average_of_1_to_5_is_that_of_the_reference():
    run, hook = Weights(), exponential(0.9)
    found = run.take(begun(hook, run), 5)
    assert found == pytest.approx(3.209714, abs=1e-6)
    # From 0, and not made up for what is missing.
    assert found * (1 - 0.9**5) == pytest.approx(1.314410, abs=1e-6)


def test_a_warm_average_of_1_to_5_is_that_of_the_reference():
    run, hook = Weights(), exponential(0.9, warm=True)
    found = run.take(begun(hook, run), 5)
    missing = math.prod((1 + n) / (10 + n) for n in range(1, 6))
    assert found * (1 - missing) == pytest.approx(4.400200, abs=1e-6)


def test_the_first_average_is_the_weights_and_a_skipped_step_does_not_count():
    run, hook = Weights(), exponential(0.9)
    assert run.take(begun(hook, run), 1) == 1.0
    other = Weights()
    skipping = begun(exponential(0.9), other)
    assert run.take(hook, 2) == pytest.approx((0.9**2 + 0.9 * 2 + 3) / (0.9**2 + 0.9 + 1))
    assert other.take(skipping, 3, skipped=(2,)) == pytest.approx((0.9 * 1 + 3) / 1.9)
    assert skipping.state_dict()["num_averaged"] == 2


def test_the_horizon_is_in_tokens_whatever_the_batch():
    section = ExponentialAverageConfig(horizon_tokens=1000)
    one, two = (find_decay(section, 1, tokens) for tokens in (50, 100))
    assert two == pytest.approx(one**2)
    assert one**20 == pytest.approx(1 / math.e)


def test_an_exponential_average_goes_on_from_its_state():
    run = Weights()
    hook = begun(exponential(0.9, warm=True), run)
    run.take(hook, 3)
    again = Weights(first_step=3)
    other = begun(exponential(0.9, warm=True), again, hook.state_dict())
    (state,) = other.weight_states().values()
    state.pieces[0].copy_(hook.weight_states()["ema"].pieces[0])
    assert again.take(other, 2) == run.take(hook, 2)
    assert other.weight_states()["ema"].about == hook.weight_states()["ema"].about


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, [4, 7, 11, 14]),
        ({"last": 2}, [11, 14]),
        ({"every_epochs": 0.5, "from_share": 0.5}, [9, 11, 13, 14]),
        ({"every_steps": 5}, [5, 10]),
        ({"every_tokens": 144, "last": 1}, [14]),
    ],
)
def test_a_plain_mean_is_that_of_its_moments(fields, steps):
    run = Weights()
    hook = begun(UniformAverage(UniformAverageConfig(**fields)), run)
    assert hook.weight_states() == {}
    assert run.take(hook, 14) == pytest.approx(sum(steps) / len(steps))
    assert hook.state_dict()["num_averaged"] == len(steps)


@given(
    st.integers(1, 60),
    st.integers(1, 90),
    st.floats(0.1, 3).map(lambda number: round(number, 2)),
    st.integers(0, 200),
)
def test_moments_are_counted_as_they_come(batch, windows, epochs, num_steps):
    section = UniformAverageConfig(every_epochs=epochs)
    config: Any = SimpleNamespace(
        batch=SimpleNamespace(global_batch_size=batch), data=SimpleNamespace(seq_length=1)
    )
    moments = section.find_moments(config, num_steps, windows)
    if moments.stride < 1:
        return
    included = [step for step in range(1, num_steps + 1) if moments.includes(step)]
    assert [moments.count(step) for step in included] == list(range(1, len(included) + 1))
    assert moments.count(num_steps) == len(included) == moments.last


def test_a_mean_goes_on_where_its_moments_are_the_same_and_begins_anew_where_not():
    run = Weights()
    hook = begun(UniformAverage(UniformAverageConfig(last=3)), run)
    run.take(hook, 11)
    state = hook.state_dict()
    same = Weights(first_step=11)
    other = begun(UniformAverage(UniformAverageConfig(last=3)), same, state)
    other.weight_states()["swa"].pieces[0].fill_(9.0)
    assert same.take(other, 3) == pytest.approx((7 + 11 + 14) / 3)
    assert same.said == []
    # Longer, it ends with the moments of steps 14, 18 and 21.
    longer = Weights(num_steps=21, first_step=11)
    anew = begun(UniformAverage(UniformAverageConfig(last=3)), longer, state)
    assert longer.said == ["the average swa has other moments than before and begins anew"]
    assert longer.take(anew, 10) == pytest.approx((14 + 18 + 21) / 3)
    # From the whole run on, what came before is lost, but for the weights at hand.
    wider = Weights(first_step=11)
    wider.weight.fill_(11.0)
    late = begun(UniformAverage(UniformAverageConfig()), wider, state)
    assert wider.said[0].endswith("begins anew, without the first 2 of its 4 moments")
    assert wider.take(late, 3) == pytest.approx((11 + 14) / 2)


@pytest.mark.parametrize(
    ("hook", "told"),
    [
        ({"kind": "ema"}, "horizon_tokens"),
        ({"kind": "ema", "horizon_tokens": 9, "name": "raw"}, "raw is what the weights"),
        ({"kind": "ema", "horizon_tokens": 9, "name": "a/b"}, "should match pattern"),
        ({"kind": "swa", "every_steps": 2, "every_epochs": 1}, "every_epochs and hooks.every_st"),
        ({"kind": "swa", "last": 2, "from_share": 0.5}, "hooks.last and hooks.from_share"),
        ({"kind": "swa", "horizon_tokens": 9}, "horizon_tokens"),
        ({"kind": "emma"}, "did you mean ema"),
    ],
)
def test_what_no_average_can_be_is_refused(tree, hook, told):
    with pytest.raises(ConfigError) as caught:
        parse_config(tree | {"hooks": [hook]})
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"every_tokens": 1}, "every_tokens=1 of kind=swa is less than one step"),
        ({"every_steps": 6}, "average of the hook 'swa' needs more than the 0 such moments"),
        ({"every_steps": 3, "last": 2}, "last=2 of the hook 'swa' needs more than the 1 such mo"),
    ],
)
def test_moments_that_a_run_does_not_have_are_refused_before_it_starts(tree, fields, told):
    with pytest.raises(ConfigError) as caught:
        make_plan(parse_config(tree | {"hooks": [{"kind": "swa", **fields}]}))
    assert told in str(caught.value)


def test_two_averages_need_two_names(tree):
    hooks = [{"kind": "ema", "horizon_tokens": tokens} for tokens in (100, 1000)]
    with pytest.raises(ConfigError, match=r"hooks\.1\.kind=ema has the name 'ema' of another hook"):
        build_own_hooks(parse_config(tree | {"hooks": hooks}))
    hooks[1]["name"] = "long"
    named = build_own_hooks(parse_config(tree | {"hooks": hooks}))
    assert [hook.name for hook in named] == ["ema", "long"]


def test_disk_space_counts_the_averages(tree, monkeypatch):
    def asked(hooks):
        plan = make_plan(parse_config(tree | {"hooks": hooks}))
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
        said = find_missing_space(plan)
        monkeypatch.undo()
        return int(said.rpartition("one checkpoint of ")[2].split()[0].replace(",", ""))

    assert asked([{"kind": "swa", "every_steps": 1}]) * 3 == asked([]) * 4
