"""Remasking, parallel decoding, ends of text and windows: what goes beyond one plain schedule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_denoisers import JOINT, MASK, ToyDenoiser, V, chi_square, frequencies, run

from megatron_mdm.diffusion.decoding import SCORED_ORDERS, Decoding, derive_seeds
from megatron_mdm.diffusion.samplers import sample

rows_of = st.lists(st.lists(st.integers(0, MASK), min_size=6, max_size=6), min_size=1, max_size=4)
extras_of = st.sampled_from(
    [
        {"remasking": 0.3, "order": "confidence"},
        {"remasking": 0.6, "order": "random"},
        {"remasking": 0.5, "order": "margin", "end_token_id": 2},
        {"remasking": 0.2, "order": "random", "end_token_id": 2, "block_length": 2},
        {"threshold": 0.4, "order": "confidence"},
        {"threshold": 1.2, "order": "entropy", "block_length": 3},
        {"threshold": 0.1, "order": "margin", "end_token_id": 3},
        {"top_k": 2, "order": "entropy"},
        {"top_p": 0.6, "order": "random", "end_token_id": 1},
    ]
)


@settings(max_examples=150, deadline=None)
@given(rows_of, extras_of, st.integers(3, 9))
def test_a_sequence_depends_on_no_batch_mate_whatever_the_options(rows, extras, num_steps):
    options = {"temperature": 0.9, "num_steps": num_steps} | extras
    seeds = derive_seeds(5, len(rows))
    whole, calls = run(rows, seeds=seeds, **options)
    assert ((whole >= 0) & (whole < V)).all()
    given_tokens = torch.tensor(rows)
    assert torch.equal(whole[given_tokens != MASK], given_tokens[given_tokens != MASK])
    for row, seed, expected in zip(rows, seeds, whole, strict=True):
        assert torch.equal(run([row], seeds=[seed], **options)[0][0], expected)
    assert "block_length" in extras or calls <= num_steps


@pytest.mark.parametrize("remasking", [0.01, 0.5, 0.9])
@pytest.mark.parametrize("order", ["confidence", "entropy", "random", "left_to_right"])
@pytest.mark.parametrize("num_steps", [3, 8, 20])
def test_revision_takes_exactly_its_steps_and_each_reveals_something(remasking, order, num_steps):
    states = [torch.full((8,), MASK)]
    filled, calls = run(
        [[MASK] * 8],
        remasking=remasking,
        order=order,
        num_steps=num_steps,
        temperature=1.0,
        callback=lambda reveal: states.append(reveal.x_BS[0]),
    )
    assert calls == num_steps
    assert (filled < V).all()
    left = [int((x == MASK).sum()) for x in states]
    assert left == [8 - -(-step * 8 // num_steps) for step in range(num_steps + 1)]
    if remasking == 0.9 or num_steps > 8:
        # Something revealed was changed, or at least hidden for a step.
        pairs = list(itertools.pairwise(states))
        assert any(((a != b) & (a != MASK)).any() for a, b in pairs)


def test_random_revision_one_token_at_a_time_keeps_the_exact_joint():
    """Hiding a random token and drawing it anew from its conditional is a Gibbs step."""
    counts = frequencies(JOINT, 4000, order="random", num_steps=9, remasking=0.01)
    assert chi_square(counts, JOINT) < 24.3  # 7 degrees of freedom, p = 0.001


def test_revision_hides_what_was_revealed_with_the_lowest_probability():
    probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.7, 0.3]])
    states = []
    sample(
        lambda x_BS: probs.log()[None],
        torch.full((1, 4), 2),
        Decoding(order="left_to_right", num_steps=4, remasking=0.5),
        mask_token_id=2,
        callback=lambda reveal: states.append((reveal.x_BS[0] == 2).nonzero().flatten().tolist()),
    )
    # After two steps 0 and 1 are revealed; 1 is hidden again and comes back with 2.
    assert states == [[1, 2, 3], [2, 3], [3], []]
    confidences = []
    sample(
        lambda x_BS: probs.log()[None],
        torch.full((1, 4), 2),
        Decoding(order="left_to_right", num_steps=4, remasking=0.5),
        mask_token_id=2,
        callback=lambda reveal: confidences.append(reveal.probability_BS[0]),
    )
    torch.testing.assert_close(confidences[-1], probs[:, 0])
    assert confidences[0].isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize("order", SCORED_ORDERS)
def test_threshold_reveals_all_that_is_sure_enough_at_once(order):
    probs = torch.tensor([[0.98, 0.02], [0.55, 0.45], [0.99, 0.01], [0.97, 0.03]])
    threshold = {"confidence": 0.96, "margin": 0.9, "entropy": 0.2}[order]
    states = []
    sample(
        lambda x_BS: probs.log()[None],
        torch.full((1, 4), 2),
        Decoding(order=order, threshold=threshold),
        mask_token_id=2,
        callback=lambda reveal: states.append((reveal.x_BS[0] == 2).tolist()),
    )
    assert states == [[False, True, False, False], [False] * 4]


@settings(max_examples=40, deadline=None)
@given(rows_of, st.sampled_from(SCORED_ORDERS), st.integers(1, 6))
def test_threshold_out_of_reach_changes_nothing_and_none_fills_at_once(rows, order, num_steps):
    plain = run(rows, order=order, num_steps=num_steps)
    never = 0.0 if order == "entropy" else 1.5
    same = run(rows, order=order, num_steps=num_steps, threshold=never)
    assert torch.equal(same[0], plain[0])
    assert same[1] == plain[1]
    always = 50.0 if order == "entropy" else 0.0
    assert run(rows, order=order, num_steps=num_steps, threshold=always)[1] <= 1


def test_tokens_after_the_first_generated_end_become_it_and_cost_nothing():
    def next_token(x_BS):
        # Position i wants token i, surest at position 3.
        logits = torch.zeros(*x_BS.shape, V)
        for i in range(x_BS.shape[1]):
            logits[:, i, i % V] = 9.0 if i == 3 else 5.0 - 0.1 * i
        return logits

    x_BS = torch.full((1, 10), MASK)
    x_BS[0, 8] = 6  # a fixed token after the end stays
    seen = []
    filled = sample(
        next_token,
        x_BS,
        Decoding(end_token_id=3, remasking=0.0),
        mask_token_id=MASK,
        callback=lambda reveal: seen.append(reveal.x_BS[0].tolist()),
    )
    assert filled[0].tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 6, 3]
    assert seen[0] == [MASK, MASK, MASK, 3, 3, 3, 3, 3, 6, 3]
    assert len(seen) == 4
    # An end token in the prompt ends nothing.
    x_BS = torch.tensor([[3, MASK, MASK]])
    kept = sample(next_token, x_BS, Decoding(end_token_id=3), mask_token_id=MASK)
    assert kept.tolist() == [[3, 1, 2]]
    # Forbidden, it is never chosen.
    decoding = Decoding(forbidden_token_ids=(3,))
    assert 3 not in sample(next_token, torch.full((1, 7), MASK), decoding, mask_token_id=MASK)


def test_blocks_after_the_end_need_no_pass():
    denoiser = ToyDenoiser()
    denoiser.table[:] = 0
    denoiser.table[1, :, 4] = 1.0
    decoding = Decoding(end_token_id=4, block_length=2, num_steps=8)
    filled = sample(denoiser, torch.full((2, 8), MASK), decoding, mask_token_id=MASK, vocab_size=V)
    assert (filled == 4).all()
    assert denoiser.calls == 1


class RecordingDenoiser(ToyDenoiser):
    """Gives only what is asked for, and records it."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def logits_at(self, x_BS, needed_BS, window):
        self.asked.append((needed_BS.clone(), window, x_BS.clone()))
        return self(x_BS)[needed_BS]


@settings(max_examples=60, deadline=None)
@given(
    rows_of,
    st.sampled_from(["confidence", "margin", "random", "left_to_right", "ancestral"]),
    st.sampled_from([None, 2]),
    st.sampled_from([0.0, 0.3]),
)
def test_windowed_denoiser_is_asked_for_what_can_change_and_gives_the_same(
    rows, order, block_length, remasking
):
    if order == "ancestral":
        remasking = 0.0
    options = {"order": order, "block_length": block_length, "remasking": remasking}
    options |= {"temperature": 0.8, "num_steps": 5}
    denoiser = RecordingDenoiser()
    names = {"mask_token_id": MASK, "vocab_size": V}
    filled = sample(denoiser, torch.tensor(rows), Decoding(**options), **names)
    assert torch.equal(filled, run(rows, **options)[0])
    before = None
    for needed_BS, window, x_BS in denoiser.asked:
        columns = needed_BS.any(0).nonzero().flatten()
        assert columns.min() >= window.start
        assert columns.max() < window.stop
        assert (x_BS[needed_BS] == MASK).all()
        if window.step:
            changed = (x_BS != before).any(0)
            assert not changed[: window.start].any()
            assert not changed[window.stop :].any()
        before = x_BS


def test_top_k_and_top_p_keep_the_right_tokens_with_the_right_frequencies():
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1])
    x_BS = torch.full((1, 6000), 4)

    def counts(**options):
        decoding = Decoding(num_steps=1, temperature=1.0, order="random", **options)
        filled = sample(lambda x: probs.log().expand(1, 6000, 4), x_BS, decoding, mask_token_id=4)
        return torch.bincount(filled[0], minlength=4).float()

    top_k = counts(top_k=3)
    assert top_k[3] == 0
    assert chi_square(top_k[:3], probs[:3] / 0.9) < 13.8  # 2 dof, p = 0.001
    # 0.4 alone does not reach 0.5, with 0.3 it does.
    top_p = counts(top_p=0.5)
    assert top_p[2:].tolist() == [0, 0]
    assert chi_square(top_p[:2], probs[:2] / 0.7) < 10.8  # 1 dof, p = 0.001
    assert counts(top_p=0.01)[0] == 6000
    assert chi_square(counts(top_k=9, top_p=1.0), probs) < 16.3


@pytest.mark.slow
def test_noise_is_fine_enough_for_rare_tokens():
    """Four million tokens share 7 % of the probability, each 18 nats below the best one.

    Gumbel noise in float32, -log(-log(u)), ends at 16.6, so such a token wins only where the best
    one draws badly: an eighth as often. Chi-square against the exact share, 1 degree of freedom.
    """
    num_rare, gap, num_draws = 2**22, 17.85, 120
    logits_V = torch.zeros(num_rare + 1)
    logits_V[0] = gap
    filled = sample(
        lambda x_BS: logits_V.expand(1, num_draws, -1),
        torch.full((1, num_draws), num_rare + 1),
        Decoding(temperature=1.0, order="left_to_right"),
        mask_token_id=num_rare + 1,
    )
    share = num_rare / (num_rare + math.exp(gap))
    counts = torch.bincount((filled[0] != 0).long(), minlength=2)
    assert chi_square(counts, torch.tensor([1 - share, share])) < 6.6  # p = 0.01
