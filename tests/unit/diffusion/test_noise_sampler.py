"""Sampling under hybrid and uniform noise: laws of samples, options, each sequence by itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from bound_reference import JOINT, MASK, N, exact_x_hat

from megatron_mdm.diffusion.decoding import Decoding
from megatron_mdm.diffusion.interpolation import HybridNoise, ShiftedNoise, UniformNoise
from megatron_mdm.diffusion.noise_sampler import sample_noise

NOISES = [HybridNoise(N, 0.2), HybridNoise(N, 0.2, 2.0), UniformNoise(N), ShiftedNoise(N, 0.0)]
P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def without_context(x_BS):
    return P.log().expand(*x_BS.shape, N)


def run(denoiser, x_BS, noise, *, seeds=None, callback=None, **options):
    return sample_noise(
        denoiser,
        x_BS,
        noise,
        Decoding(**options),
        mask_token_id=MASK,
        vocab_size=N,
        seeds=seeds,
        callback=callback,
    )


@pytest.mark.parametrize("noise", NOISES, ids=repr)
@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("order", ["ancestral", "adaptive"])
def test_independent_tokens_have_their_law_after_any_number_of_steps(noise, num_steps, order):
    x_BS = torch.full((1, 8000), MASK)
    found = run(without_context, x_BS, noise, num_steps=num_steps, order=order)
    shares = torch.bincount(found.flatten(), minlength=N + 1) / found.numel()
    np.testing.assert_allclose(shares, [*P, 0], atol=4 * 0.5 / 8000**0.5)


@pytest.mark.parametrize("noise", NOISES, ids=repr)
def test_two_tokens_follow_their_joint_with_the_exact_predictor(noise):
    num_steps, calls = 48, []

    def denoise(x_BS):
        # It knows the time, so that x_hat is p(x_i | the noisy other token) at every step.
        t = min(1 - len(calls) / num_steps, 1 - 1e-4)
        calls.append(t)
        rows = [
            [exact_x_hat(noise, t, (z, z), place) for z in range(N + bool(noise.at(t).mask))]
            for place in (0, 1)
        ]
        x_hat = [torch.tensor(np.array(rows[place]))[x_BS[:, 1 - place]] for place in (0, 1)]
        return torch.stack(x_hat, 1).log()

    found = run(denoise, torch.full((4000, 2), MASK), noise, num_steps=num_steps)
    shares = torch.bincount(found @ torch.tensor([N, 1]), minlength=N * N) / len(found)
    # Both places of a step are drawn at once, which costs less the shorter the steps are.
    np.testing.assert_allclose(shares.reshape(N, N), JOINT, atol=0.026)


def depends_on_neighbour(x_BS):
    left = torch.nn.functional.pad(x_BS, (1, 0), value=0)[:, :-1]
    return torch.nn.functional.one_hot((left + 1) % N, N) * 3.0


@pytest.mark.parametrize("options", [{}, {"order": "adaptive"}, {"correction_steps": 9}])
@pytest.mark.parametrize("noise", NOISES[:3:2], ids=repr)
def test_a_sequence_depends_on_its_seed_and_not_on_its_batch_mates(noise, options):
    x_BS = torch.tensor([[1, MASK, MASK, MASK, 0], [MASK, 2, MASK, 0, 1], [0, 1, 2, 0, 1]])
    together = run(depends_on_neighbour, x_BS, noise, seeds=[5, 6, 7], num_steps=4, **options)
    for row in range(3):
        alone = run(
            depends_on_neighbour,
            x_BS[row : row + 1],
            noise,
            seeds=[5 + row],
            num_steps=4,
            **options,
        )
        assert alone.tolist() == together[row : row + 1].tolist()
    given = x_BS != MASK
    assert (together[given] == x_BS[given]).all()
    assert (together != MASK).all()


def test_correction_ends_where_nothing_changes():
    steps = []
    x_BS = torch.tensor([[0, MASK, MASK, MASK, MASK, MASK]])
    sharp = lambda x_BS: 20 * depends_on_neighbour(x_BS)  # noqa: E731
    found = run(sharp, x_BS, NOISES[2], num_steps=1, correction_steps=50, callback=steps.append)
    assert found.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert len(steps) < 30
    # One position a pass; the last pass changes nothing.
    for before, after in itertools.pairwise(steps):
        assert (before.x_BS != after.x_BS).sum() <= 1
    assert steps[-1].x_BS.tolist() == found.tolist()


def test_correction_takes_no_more_passes_than_allowed():
    steps = []
    x_BS = torch.full((2, 30), MASK)
    run(
        depends_on_neighbour,
        x_BS,
        NOISES[0],
        num_steps=2,
        correction_steps=3,
        callback=steps.append,
    )
    assert len(steps) == 5


def test_adaptive_draws_each_position_once():
    steps = []
    x_BS = torch.full((1, 7), MASK)
    run(without_context, x_BS, NOISES[0], num_steps=3, order="adaptive", callback=steps.append)
    left = [(step.x_BS == MASK).sum().item() for step in steps]
    assert left == [4, 2, 0]


def test_what_follows_the_end_of_text_is_the_end_of_text():
    x_BS = torch.tensor([[0, MASK, MASK, MASK, MASK]])
    sharp = lambda x_BS: 20 * depends_on_neighbour(x_BS)  # noqa: E731
    found = run(sharp, x_BS, NOISES[2], num_steps=1, correction_steps=50, end_token_id=2)
    assert found.tolist() == [[0, 1, 2, 2, 2]]


def test_forbidden_tokens_are_not_among_the_samples():
    x_BS = torch.full((1, 500), MASK)
    found = run(without_context, x_BS, NOISES[2], num_steps=3, forbidden_token_ids=(0,))
    assert (found != 0).all()


def test_the_best_token_is_taken_without_temperature():
    x_BS = torch.full((1, 50), MASK)
    found = run(without_context, x_BS, NOISES[0], num_steps=5, temperature=0.0)
    assert (found == 0).all()


def test_guidance_asks_twice():
    seen = []

    def denoise(x_BS):
        seen.append(len(x_BS))
        return without_context(x_BS)

    sample_noise(
        denoise,
        torch.tensor([[1, MASK]]),
        NOISES[0],
        Decoding(guidance_scale=0.5, num_steps=2),
        mask_token_id=MASK,
        vocab_size=N,
        guidance_tokens_BS=torch.full((1, 2), MASK),
    )
    assert seen == [2, 2]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"order": "confidence"}, "order='confidence' is for noise of masks alone"),
        ({"remasking": 0.1, "order": "random"}, "remasking=0.1 is for noise of masks alone"),
        ({"block_length": 4}, "block_length=4 is for noise of masks alone"),
        ({"use_cache": True}, "use_cache=True is for noise of masks alone"),
        ({"guidance_scale": 1.0}, "guidance_scale=1.0 needs a pass with the prompt masked"),
    ],
)
def test_options_of_masks_alone_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(without_context, torch.full((1, 4), MASK), NOISES[2], **options)


@pytest.mark.parametrize("options", [{"order": "adaptive"}, {"correction_steps": 3}])
def test_options_of_other_noise_are_refused_where_it_is_masks_alone(options):
    with pytest.raises(ValueError, match="revises random tokens, and this model's noise is masks"):
        Decoding(**options).resolve(continues=True)


class Recorder:
    """Records what it is told of the noise."""

    def __init__(self):
        self.told = []

    def logits_at(self, x_BS, needed_BS, window):
        self.told.append(window.log_snr_B)
        return without_context(x_BS)[needed_BS]


@pytest.mark.parametrize("noise", [NOISES[0], NOISES[2]], ids=repr)
@pytest.mark.parametrize("order", ["ancestral", "adaptive"])
def test_the_denoiser_is_told_the_log_snr_of_each_sequence_at_each_step(noise, order):
    # Two and four tokens to generate, a step for each.
    x_BS = torch.tensor([[MASK, 1, MASK, 0], [MASK] * 4])
    recorder, options = Recorder(), Decoding(order=order, correction_steps=2)
    sample_noise(
        recorder, x_BS, noise, options, mask_token_id=MASK, vocab_size=N, tells_log_snr=True
    )
    # A sequence that has taken its steps, and self-correction, stay at the time of the last one.
    times = [(1 - 1e-4, 1 - 1e-4), (1 / 2, 3 / 4), (1 / 2, 1 / 2), (1 / 2, 1 / 4)]
    times += [times[-1]] * (len(recorder.told) - 4)
    assert len(times) > 4
    for (one, other), told_B in zip(times, recorder.told, strict=True):
        clean_B = np.array([noise.at(t).clean for t in (one, other)])
        np.testing.assert_allclose(told_B, np.log(clean_B / (1 - clean_B)), rtol=1e-5)


def test_both_passes_of_guidance_are_told_the_same_log_snr():
    x_BS = torch.tensor([[MASK, 1, MASK, 0], [MASK] * 4])
    recorder, options = Recorder(), Decoding(guidance_scale=1.0, num_steps=3)
    sample_noise(
        recorder,
        x_BS,
        NOISES[0],
        options,
        mask_token_id=MASK,
        vocab_size=N,
        guidance_tokens_BS=torch.full_like(x_BS, MASK),
        tells_log_snr=True,
    )
    assert len(recorder.told) == 3
    for told_2B in recorder.told:
        assert told_2B.tolist() == [told_2B[0].item()] * 4


def test_nothing_is_told_to_models_without_an_embedding_of_the_noise():
    recorder = Recorder()
    x_BS = torch.full((1, 3), MASK)
    sample_noise(recorder, x_BS, NOISES[0], Decoding(), mask_token_id=MASK, vocab_size=N)
    assert recorder.told == [None] * 3
