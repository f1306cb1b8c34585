from __future__ import annotations

import numpy as np
import pytest
from plan_examples import SEQ, plan_of, refusal, write_checkpoint, write_shards

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.data.mixture import OrderStart, SampleOrder

CONSTANT = {"kind": "constant", "steps": 5, "warmup_steps": 1}
RISING = {
    "weight_decay": {
        "kind": "piecewise",
        "points": [{"at": 0.5, "factor": 1.0}, {"at": 1.0, "factor": 2.0}],
    }
}


def longer(tree, before, after, step=3):
    """The plan of a run whose checkpoint was saved under another schedule."""
    tree["schedule"] = before
    write_checkpoint(tree, step=step)
    tree["schedule"] = after
    return plan_of(tree)


@pytest.mark.parametrize(
    ("before", "after", "step"),
    [
        (CONSTANT, CONSTANT | {"steps": 50}, 5),
        (CONSTANT, CONSTANT | {"steps": 4}, 3),
        (CONSTANT, {"kind": "constant", "epochs": 4, "warmup_steps": 1}, 5),
        # A trunk gets its decay.
        (CONSTANT, {"kind": "wsd", "steps": 6, "decay_fraction": 0.5, "warmup_steps": 1}, 3),
        ({"kind": "wsd", "steps": 10, "warmup_steps": 1}, {"kind": "wsd", "steps": 20}, 8),
        # Weight decay that is still held.
        (CONSTANT | RISING, CONSTANT | RISING | {"steps": 50}, 2),
        # Of a cosine the warm-up alone is the same.
        ({"steps": 5, "warmup_steps": 3}, {"steps": 50, "warmup_steps": 3}, 3),
    ],
)
def test_a_run_can_be_made_longer_where_no_rate_that_was_used_changes(tree, before, after, step):
    plan = longer(tree, before, after, step)
    assert plan.first_step == step
    steps = after.get("steps") or -(-4 * (100 // SEQ) // 4)
    assert plan.num_steps == steps
    remark = f"the run has {steps} steps now, after {before['steps']} before"
    assert plan.data.remarks == [remark]
    # One source: the order of a run that was as long from the start.
    assert plan.data.order_start is None
    assert plan.data.order.total == 4 * steps


def test_a_warmup_that_is_a_share_stays_as_long_as_it_was(tree):
    before = {"kind": "constant", "steps": 20, "warmup_fraction": 0.1}
    plan = longer(tree, before, before | {"steps": 400}, step=5)
    assert plan.config.schedule.num_warmup_steps(400) == 2


@pytest.mark.parametrize(
    ("before", "after", "step"),
    [
        ({"steps": 5}, {"steps": 50}, 3),
        ({"kind": "wsd", "steps": 10}, {"kind": "wsd", "steps": 20}, 10),
        (CONSTANT, CONSTANT | {"warmup_steps": 2}, 3),
        (CONSTANT | RISING, CONSTANT | RISING | {"steps": 50}, 4),
        (CONSTANT | RISING, CONSTANT | {"weight_decay": {"kind": "constant"}}, 4),
    ],
)
def test_a_run_whose_rates_would_be_others_is_refused(tree, before, after, step):
    tree["schedule"] = before
    path = write_checkpoint(tree, step=step)
    message = refusal(ConfigError, tree, schedule=after)
    assert f"and {path} was trained with " in message
    assert "mdm branch" in message


def test_a_run_that_would_end_before_its_checkpoint_is_refused(tree):
    tree["schedule"] = CONSTANT
    path = write_checkpoint(tree, step=3)
    message = refusal(ConfigError, tree, schedule={"steps": 2})
    assert message.startswith(f"The schedule ends the run at step 2, and {path} has taken 3: ")


def test_each_source_of_a_mixture_goes_on_with_its_passes(tree, tmp_path):
    write_shards(tmp_path / "other", np.arange(60))
    paths = [tmp_path / "train", tmp_path / "other"]
    tree["data"]["train"] = [
        {"path": str(path), "weight": weight} for path, weight in zip(paths, (3, 1), strict=True)
    ]
    schedule = CONSTANT | {"steps": 7}
    first = plan_of(tree, schedule=schedule).data.order
    plan = longer(tree, schedule, CONSTANT | {"steps": 31}, step=7)
    order = plan.data.order
    assert plan.data.order_start == OrderStart(28, tuple(first.count_visits(28)))
    assert order.count_visits(28) == first.count_visits(28) == [21, 7]
    # 96 more samples, 3 to 1; together every window of a pass once.
    assert order.count_visits(124) == [21 + 72, 7 + 24]
    seen = [one.find_visits(np.arange(*part)) for one, part in ((first, (28,)), (order, (28, 124)))]
    sources, epochs, windows = (
        np.concatenate(column) for column in list(zip(*seen, strict=True))[:3]
    )
    for source, (count, size) in enumerate(zip([93, 31], first.windows, strict=True)):
        mine = sources == source
        assert mine.sum() == count
        for epoch in range(count // size):
            assert sorted(windows[mine & (epochs == epoch)]) == list(range(size))


def test_an_order_that_starts_later_repeats_none_and_leaves_none_out():
    options = {"seq_length": 4, "kind": "shuffle", "seed": 3}
    whole = SampleOrder([40], [7], **options)
    later = SampleOrder([25], [7], **options, start=OrderStart(15, (15,)))
    assert later.total == whole.total
    here = np.arange(15, 40)
    for found, expected in zip(later.find_visits(here), whole.find_visits(here), strict=True):
        assert found.tolist() == expected.tolist()
    assert [later.count_visits(p) for p in here] == [whole.count_visits(p) for p in here]
