from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_denoisers import JOINT, MASK, ToyDenoiser, V, chi_square, frequencies, run

from megatron_mdm.diffusion.block_steps import count_unmasked_after, share_steps
from megatron_mdm.diffusion.decoding import PLANNED_ORDERS, SCORED_ORDERS, Decoding, derive_seeds
from megatron_mdm.diffusion.samplers import sample, sample_left_to_right
from megatron_mdm.diffusion.token_choice import guided_logits

# Those of noise that is masks alone.
ORDERS = (*SCORED_ORDERS, *PLANNED_ORDERS)

rows_of = st.lists(st.lists(st.integers(0, MASK), min_size=6, max_size=6), min_size=1, max_size=4)
options_of = st.fixed_dictionaries(
    {
        "order": st.sampled_from(ORDERS),
        "temperature": st.sampled_from([0.0, 0.7]),
        "num_steps": st.integers(1, 8),
    }
)


@settings(max_examples=80, deadline=None)
@given(rows_of, options_of)
def test_every_mask_is_filled_and_fixed_tokens_stay(rows, options):
    filled, calls = run(rows, **options)
    given_tokens = torch.tensor(rows)
    assert torch.equal(filled[given_tokens != MASK], given_tokens[given_tokens != MASK])
    assert ((filled >= 0) & (filled < V)).all()
    masks = max(row.count(MASK) for row in rows)
    if options["order"] == "ancestral":
        assert calls <= min(options["num_steps"], masks)
        assert (calls > 0) == (masks > 0)
    else:
        assert calls == min(options["num_steps"], masks)


@settings(max_examples=80, deadline=None)
@given(rows_of, options_of, st.randoms(use_true_random=False), st.booleans())
def test_result_of_a_sequence_depends_on_nothing_else_in_the_batch(rows, options, random, blocks):
    if blocks:
        options |= {"block_length": 2, "num_steps": max(options["num_steps"], 3)}
    seeds = derive_seeds(5, len(rows))
    whole, _ = run(rows, seeds=seeds, **options)
    for row, seed, expected in zip(rows, seeds, whole, strict=True):
        assert torch.equal(run([row], seeds=[seed], **options)[0][0], expected)
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled, _ = run([rows[i] for i in order], seeds=[seeds[i] for i in order], **options)
    assert torch.equal(shuffled, whole[order])


def test_seeds_of_a_batch_do_not_depend_on_its_size_and_differ():
    assert derive_seeds(3, 8)[:2] == derive_seeds(3, 2)
    seeds = [seed for s in range(50) for seed in derive_seeds(s, 50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)


@given(st.integers(0, 500), st.integers(1, 600))
def test_schedule_is_even_and_wastes_no_step(num_masks, num_steps):
    num_steps = max(min(num_masks, num_steps), 1)
    totals = [count_unmasked_after(step, num_steps, num_masks) for step in range(num_steps + 1)]
    counts = [after - before for before, after in itertools.pairwise(totals)]
    assert (totals[0], totals[-1]) == (0, num_masks)
    assert not num_masks or min(counts) >= 1
    assert max(counts) - min(counts) <= 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 60))
def test_blocks_share_all_steps_and_get_no_more_than_they_have_masks(sizes, extra):
    num_steps = min(len(sizes) + extra, sum(sizes))
    shares = share_steps(sizes, num_steps)
    assert sum(shares) == num_steps
    assert all(1 <= share <= size for share, size in zip(shares, sizes, strict=True))
    # With more steps than masks, which only revision needs, none is lost.
    assert sum(share_steps(sizes, sum(sizes) + extra)) == sum(sizes) + extra


@pytest.mark.parametrize("order", ORDERS)
def test_steps_reveal_the_scheduled_number_of_each_sequence(order):
    rows = [[MASK] * 6, [0, MASK, MASK, 1, MASK, 2], [0] * 6]
    states = [torch.tensor(rows)]
    run(rows, order=order, num_steps=4, callback=lambda reveal: states.append(reveal.x_BS))
    left = torch.stack([(x == MASK).sum(1) for x in states]).T.tolist()
    if order != "ancestral":
        assert left[0] == [6, 4, 2, 1, 0]
        assert left[1] == [3, 2, 1, 0, 0]
    assert all(before >= after for counts in left for before, after in itertools.pairwise(counts))
    assert [counts[-1] for counts in left] == [0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.sampled_from(ORDERS))
def test_blocks_are_filled_in_turn_within_the_steps(num_masks, block_length, num_steps, order):
    blocks = math.ceil(num_masks / block_length)
    row = [[1, *[MASK] * num_masks, 2]]
    options = {"order": order, "num_steps": num_steps, "block_length": block_length}
    if min(num_steps, num_masks) < blocks:
        with pytest.raises(ValueError, match="fewer than"):
            run(row, **options)
        return
    states = []
    _, calls = run(
        row, callback=lambda reveal: states.append(reveal.x_BS[0, 1:-1] == MASK), **options
    )
    if order == "ancestral":
        assert calls <= min(num_steps, num_masks)
    else:
        assert calls == min(num_steps, num_masks)
    for masked in states:
        open_blocks = [b for b in range(blocks) if masked.split(block_length)[b].any()]
        begun = [b for b in range(blocks) if not masked.split(block_length)[b].all()]
        assert not open_blocks or all(b <= open_blocks[0] for b in begun)


def fixed(logits):
    """A denoiser that always gives the same logits [S, V]."""
    return lambda x_BS: logits.expand(x_BS.shape[0], -1, -1)


@pytest.mark.parametrize(
    ("order", "revealed"), [("confidence", 0), ("margin", 1), ("entropy", 2), ("left_to_right", 0)]
)
def test_scored_orders_reveal_the_surest_position_first(order, revealed):
    probs = torch.tensor(
        [
            [0.55, 0.45, 1e-9, 1e-9, 1e-9, 1e-9],
            [0.50, 0.10, 0.10, 0.10, 0.10, 0.10],
            [0.53, 0.47, 1e-9, 1e-9, 1e-9, 1e-9],
        ]
    )
    if order == "entropy":
        probs[0, 2] = 0.02
    states = []
    sample(
        fixed(probs.log()),
        torch.full((1, 3), 6),
        Decoding(num_steps=3, order=order),
        mask_token_id=6,
        callback=lambda reveal: states.append(reveal.x_BS[0]),
    )
    assert (states[0] != 6).nonzero().flatten().tolist() == [revealed]


@pytest.mark.parametrize("order", ["random", "left_to_right", "ancestral"])
def test_one_token_at_a_time_samples_the_exact_joint(order):
    # A grid of 10,000 steps hardly ever reveals two of three tokens at once.
    num_steps = 10_000 if order == "ancestral" else 3
    counts = frequencies(JOINT, 4000, order=order, num_steps=num_steps)
    assert chi_square(counts, JOINT) < 24.3  # 7 degrees of freedom, p = 0.001


def test_coarse_ancestral_grid_samples_its_own_law():
    """With two steps each token falls in step 1 or 2 alike; the law is summed over all 8 cases."""
    law = torch.zeros_like(JOINT)
    for late in itertools.product([False, True], repeat=3):
        dims_late = [i for i in range(3) if late[i]]
        first = torch.ones_like(JOINT)
        for i in range(3):
            if not late[i]:
                shape = [1, 1, 1]
                shape[i] = 2
                first = first * JOINT.sum([j for j in range(3) if j != i]).reshape(shape)
        given_first = JOINT.sum(dims_late, keepdim=True) if dims_late else JOINT
        second = torch.ones_like(JOINT)
        for i in dims_late:
            rest = [j for j in dims_late if j != i]
            second = second * (JOINT.sum(rest, keepdim=True) if rest else JOINT) / given_first
        law += first * second / 8
    torch.testing.assert_close(law.sum(), torch.tensor(1.0))
    assert (law - JOINT).abs().max() > 0.02
    counts = frequencies(JOINT, 6000, order="ancestral", num_steps=2)
    assert chi_square(counts, law) < 24.3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    logits = torch.tensor([[1.5, 0.0, -1.0, 0.7, 9.0]])
    x_BS = torch.full((1, 6000), 4)
    filled = sample(
        lambda x: logits.expand(1, 6000, 5),
        x_BS,
        Decoding(num_steps=1, temperature=temperature, order="random"),
        mask_token_id=4,
    )
    counts = torch.bincount(filled[0], minlength=4).float()
    assert len(counts) == 4
    assert chi_square(counts, (logits[0, :4] / temperature).softmax(-1)) < 16.3  # 3 dof, p = 0.001


def test_guidance_matches_a_hand_computation():
    c, u = torch.tensor([1.0, 2.0, -torch.inf]), torch.tensor([0.5, 4.0, -torch.inf])
    assert guided_logits(c, u, 2.0).tolist() == [2.0, -2.0, -math.inf]
    assert guided_logits(c, u, 0.0).tolist() == c.tolist()
    assert guided_logits(c, u, -1.0).tolist() == u.tolist()


def test_guidance_forbids_what_either_pass_forbids():
    c, u = torch.tensor([-torch.inf, 1.0, 3.0]), torch.tensor([1.0, -torch.inf, 2.0])
    for scale, last in ((2.0, 5.0), (-0.5, 2.5), (-1.0, 2.0)):
        assert guided_logits(c, u, scale).tolist() == [-math.inf, -math.inf, last]


def test_guidance_hides_the_prompt_in_the_second_half_of_one_pass():
    seen = []

    def denoiser(x_BS):
        seen.append(x_BS.tolist())
        hidden = x_BS[:, :1, None] == MASK
        logits = torch.where(hidden, torch.tensor([0.5, 4.0, 0.0]), torch.tensor([1.0, 2.0, 0.0]))
        return logits.expand(-1, 3, -1)

    x_BS = torch.tensor([[0, MASK, 2]])
    options = {"mask_token_id": MASK, "guidance_tokens_BS": torch.tensor([[MASK, 0, 2]])}
    plain = sample(denoiser, x_BS, Decoding(), mask_token_id=MASK)
    off = sample(denoiser, x_BS, Decoding(), **options)
    decoding = Decoding(guidance_scale=2.0)
    guided = sample(denoiser, x_BS, decoding, **options)
    assert plain.tolist() == off.tolist() == [[0, 1, 2]]
    assert guided.tolist() == [[0, 0, 2]]
    assert seen == [[[0, MASK, 2]], [[0, MASK, 2]], [[0, MASK, 2], [MASK, MASK, 2]]]
    # Other tokens than masks in the prompt's place: what is generated stays as it is.
    given_tokens = torch.tensor([[5, 6, 4]])
    sample(denoiser, x_BS, decoding, mask_token_id=MASK, guidance_tokens_BS=given_tokens)
    assert seen[-1] == [[0, MASK, 2], [5, MASK, 4]]


@settings(max_examples=30, deadline=None)
@given(rows_of, st.sampled_from(ORDERS), st.sampled_from([0.0, 0.7]))
def test_guidance_of_zero_and_towards_the_same_tokens_change_nothing(rows, order, temperature):
    x_BS = torch.tensor(rows)
    options = {"order": order, "temperature": temperature, "num_steps": 3}
    hidden_BS = torch.full_like(x_BS, MASK)
    given_names = {"mask_token_id": MASK, "vocab_size": V, "guidance_tokens_BS": hidden_BS}
    plain, _ = run(rows, **options)
    off = sample(ToyDenoiser(), x_BS, Decoding(**options), **given_names)
    assert torch.equal(off, plain)
    # u = c, so w has nothing to amplify, and the random numbers are the same.
    scaled = Decoding(guidance_scale=1.0, **options)
    given_names = {"mask_token_id": MASK, "vocab_size": V, "guidance_tokens_BS": x_BS}
    assert torch.equal(sample(ToyDenoiser(), x_BS, scaled, **given_names), plain)


def test_left_to_right_stops_when_every_sequence_has_ended():
    def next_token(x_BS):
        logits = torch.zeros(*x_BS.shape, V + 1)
        logits[..., MASK] = 9
        return logits.scatter(-1, ((x_BS + 1) % V)[..., None], 5.0)

    prompt = torch.tensor([[3], [1]])
    options = {"mask_token_id": MASK}
    ends, plain = Decoding(end_token_id=4, max_new_tokens=6), Decoding(max_new_tokens=6)
    filled = sample_left_to_right(next_token, prompt, ends, **options)
    assert filled.tolist() == [[3, 4, 4, 4], [1, 2, 3, 4]]
    assert sample_left_to_right(next_token, prompt, plain, **options).shape == (2, 7)
    warm = Decoding(temperature=2.0, max_new_tokens=6)
    sampled = sample_left_to_right(next_token, prompt, warm, seeds=[8, 9], **options)
    alone = sample_left_to_right(next_token, prompt[1:], warm, seeds=[9], **options)
    assert torch.equal(sampled[1:], alone)
    assert (sampled < V).all()
    with pytest.raises(ValueError, match="block_length=4"):
        sample_left_to_right(next_token, prompt, Decoding(block_length=4), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"order": "best"}, "order='best'"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"block_length": 0}, "block_length=0"),
        ({"block_length": 1, "num_steps": 1}, "num_steps=1 is fewer than the 2 blocks"),
        ({"top_k": 0, "temperature": 1.0}, "top_k=0"),
        ({"top_p": 1.5, "temperature": 1.0}, "top_p=1.5"),
        ({"top_p": 0.9, "temperature": 0.0}, "top_p=0.9 has no effect"),
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"threshold": 0.9, "order": "random"}, "threshold=0.9 needs an order"),
        ({"remasking": 1.0}, "remasking=1.0"),
        ({"remasking": 0.1, "order": "ancestral"}, "remasking=0.1 does not go"),
        ({"remasking": 0.1, "threshold": 0.9}, "contradict"),
        ({"guidance_scale": math.inf}, "guidance_scale=inf"),
        ({"seeds": [1, 2]}, "2 seeds for 1"),
        ({"guidance_scale": 1.0}, "guidance_tokens_BS"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run([[MASK, 1, MASK]], **options)


@pytest.mark.parametrize(
    ("options", "continuing", "filling"),
    [
        ({}, ("random", 0.8), ("confidence", 0.0)),
        ({"temperature": 0.0}, ("confidence", 0.0), ("confidence", 0.0)),
        ({"temperature": 0.5}, ("random", 0.5), ("confidence", 0.5)),
        ({"order": "margin"}, ("margin", 0.8), ("margin", 0.0)),
        ({"threshold": 0.9}, ("confidence", 0.8), ("confidence", 0.0)),
        ({"top_p": 0.9}, ("random", 0.8), ("confidence", 0.8)),
    ],
)
def test_what_is_left_open_depends_on_whether_a_text_goes_on(options, continuing, filling):
    for continues, expected in ((True, continuing), (False, filling)):
        resolved = Decoding(**options).resolve(continues=continues)
        assert (resolved.order, resolved.temperature) == expected
        assert resolved.resolve(continues=not continues) == resolved
