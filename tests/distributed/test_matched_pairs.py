"""An AR run and an MDM run of one configuration: what both have in common, on real ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable

import cases
import numpy as np
import observations
import pairs
import pytest
from layouts import LAYOUTS
from weight_pieces import assemble
from worlds import World

from megatron_mdm.reporting.judged_windows import paired_difference

GetWorld = Callable[[int], World]

AR, MDM = {"objective.kind": "ar"}, {"objective.kind": "mdm"}
# Twelve windows in batches of eight: the second epoch begins within a batch.
NUM_STEPS = 5


def test_both_see_the_same_windows_at_the_same_positions(world_of: GetWorld) -> None:
    _, layout = LAYOUTS["dp2-zero1"]
    received = [
        world_of(2).run(observations.received_batches, overrides=layout | kind, num_steps=NUM_STEPS)
        for kind in (AR, MDM)
    ]
    for ar, mdm in zip(*received, strict=True):
        np.testing.assert_array_equal(ar["inputs"], mdm["targets"])
        is_hidden = mdm["weights"] > 0
        np.testing.assert_array_equal(is_hidden, mdm["inputs"] == mdm["mask_id"])
        np.testing.assert_array_equal(ar["inputs"][~is_hidden], mdm["inputs"][~is_hidden])
    windows = np.concatenate([rank["inputs"] for rank in received[0]], axis=1).reshape(-1, 16)
    assert len(np.unique(windows, axis=0)) == cases.NUM_WINDOWS


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_both_begin_with_the_same_weights_in_every_tensor(world_of: GetWorld, tied: bool) -> None:
    _, layout = LAYOUTS["tp2-zero1"]
    overrides = layout | {"model.tie_embeddings": tied}
    ar, mdm = (
        assemble(
            [
                piece
                for rank in world_of(2).run(cases.initial_pieces, overrides=overrides | kind)
                for piece in rank
            ]
        )
        for kind in (AR, MDM)
    )
    assert ar.keys() == mdm.keys()
    for name, values in mdm.items():
        np.testing.assert_array_equal(ar[name], values, err_msg=name)


def test_both_are_judged_on_the_same_windows_at_every_validation(world_of: GetWorld) -> None:
    _, layout = LAYOUTS["dp2-zero1"]
    settings = {"num_samples": 6, "num_train_samples": 5}
    found = [
        world_of(2).run(pairs.judge, overrides=layout | kind, validation=settings)
        for kind in (AR, MDM)
    ]
    # Six and five windows, two a call on either rank; MDM judges each a second time, with its first
    # token given. What is over is filled up.
    (held_out, training), of_mdm = (
        [
            {row.tobytes() for rank in ranks for row in rank["windows"][calls].reshape(-1, 16)}
            for calls in (slice(0, num_calls), slice(num_calls, 2 * num_calls))
        ]
        for ranks, num_calls in zip(found, (2, 3), strict=True)
    )
    assert of_mdm == [held_out, training]
    assert (len(held_out), len(training)) == (6, 5)
    for ranks, num_calls in zip(found, (2, 3), strict=True):
        assert [rank["windows"].shape for rank in ranks] == [(2 * num_calls, 2, 16)] * 2
    # So their losses can be set beside each other, window by window.
    difference = paired_difference(found[0][0]["judged"], found[1][1]["judged"])
    assert difference is not None
    metrics = [ranks[0]["metrics"]["valid/nll_given_first_nats_per_token"] for ranks in found]
    assert difference.mean == pytest.approx(metrics[1] - metrics[0])
    known = pairs.Source(cases.config_of({}))
    assert training <= {
        known.read_window(window).tokens_S.tobytes() for window in range(known.num_windows)
    }
    assert not held_out & training


@pytest.mark.parametrize("kind", [AR, MDM], ids=["ar", "mdm"])
def test_every_layout_finds_the_same_gap_whatever_the_dropout(
    world_of: GetWorld, kind: cases.Overrides
) -> None:
    settings = {"num_train_samples": 5, "draws_per_sample": 2}
    (alone,) = world_of(1).run(pairs.judge, overrides=kind, validation=settings)
    expected = alone["metrics"]
    assert expected["train/nll_standard_error"] > 0
    assert expected["valid/gap_nats_per_token"] != 0
    dropout = {"model.hidden_dropout": 0.5, "model.attention_dropout": 0.5}
    for name in ("dp2-zero3", "tp2-sp-zero1", "pp2x2-zero1"):
        _, layout = LAYOUTS[name]
        overrides = kind | layout | dropout
        for rank in world_of(2).run(pairs.judge, overrides=overrides, validation=settings):
            assert rank["metrics"] == pytest.approx(expected, abs=2e-6), name


def test_the_mean_of_an_epoch_is_that_of_its_steps_on_every_rank(world_of: GetWorld) -> None:
    _, layout = LAYOUTS["pp2-zero1"]
    overrides = layout | {"model.hidden_dropout": 0.1}

    def means(**options: int) -> tuple[list[float], list[float | None]]:
        first, second = world_of(2).run(
            pairs.epoch_means, overrides=overrides, num_steps=NUM_STEPS, **options
        )
        assert first == second
        return first["losses"], first["means"]

    losses, found = means()
    # Epochs end with steps ceil(1.5), 3 and ceil(4.5).
    of_three = [np.mean(losses[:2]), losses[2], np.mean(losses[3:])]
    assert [found[step - 1] for step in (2, 3, 5)] == pytest.approx(of_three, rel=1e-12)
    assert found[0] is found[3] is None
    losses, found = means(skipped=4)
    assert found[4] == pytest.approx(losses[4], rel=1e-12)
    # From the middle of the first epoch: its mean is left out.
    losses, found = means(first_step=1)
    assert found[0] is found[2] is None
    assert [found[1], found[3]] == pytest.approx([losses[1], np.mean(losses[2:])], rel=1e-12)


@pytest.mark.parametrize("name", ["one", "dp2-zero1"])
def test_a_run_that_goes_on_within_an_epoch_has_its_mean_bit_for_bit(
    world_of: GetWorld, name: str
) -> None:
    size, layout = LAYOUTS.get(name, (1, {}))
    run = functools.partial(
        world_of(size).run, pairs.epoch_means, overrides=layout, num_steps=NUM_STEPS
    )
    whole = run()
    # In the middle of the first epoch, and of the third; at the end of the second.
    for step in (1, 3, 4):
        assert run(resumed_after=step) == whole
