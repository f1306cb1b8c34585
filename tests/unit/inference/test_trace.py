"""A trace is the sampler's states, told by changes."""

from __future__ import annotations

import pytest
import torch

from megatron_mdm.diffusion.decoding import Decoding
from megatron_mdm.diffusion.samplers import sample, sample_left_to_right
from megatron_mdm.inference.replay.trace import Tracer

MASK = 7
ROWS = [[7, 1, 7, 7, 2, 7, 7, 7], [1, 2, 7, 7, 3, 0, 0, 0], [7, 7, 7, 7, 7, 7, 7, 7]]
LENGTHS = [8, 5, 8]


def denoiser(x_BS):
    """Random logits that depend on the tokens, so that masking again matters."""
    table = torch.randn(8, 16, 7, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(x_BS.shape[1])
    return table[x_BS, positions] + table[x_BS.roll(1, dims=1), positions]


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(num_steps=3),
        Decoding(temperature=1.0, remasking=0.4, num_steps=12),
        Decoding(temperature=1.0, order="random", remasking=0.4, num_steps=12),
        Decoding(order="entropy", threshold=1.2),
        Decoding(temperature=1.0, block_length=2, end_token_id=4),
    ],
)
def test_every_state_of_a_row_follows_from_its_changes(decoding):
    initial = torch.tensor(ROWS)
    tracer, reveals = Tracer(initial, [0, 0, 0]), []

    def follow(reveal):
        tracer(reveal)
        reveals.append(reveal)

    sample(denoiser, initial, decoding, mask_token_id=MASK, callback=follow, seeds=[1, 2, 3])
    for row, length in enumerate(LENGTHS):
        trace = tracer.trace(row, length)
        seen = [ROWS[row][:length]]
        choices = 0
        before = torch.full((length,), torch.nan)
        for reveal in reveals:
            tokens, now = reveal.x_BS[row, :length], reveal.probability_BS[row, :length]
            choices += int(((now != before) & ~now.isnan()).sum())
            # A step in which nothing became of this row is none of its own.
            if tokens.tolist() != seen[-1] or bool(((now != before) & ~now.isnan()).any()):
                seen.append(tokens.tolist())
            before = now
        assert [trace.replay(step) for step in range(len(trace.steps) + 1)] == seen
        told = [change for step in trace.steps for change in step if change.probability is not None]
        assert len(told) == choices
        assert all(change.token_id != MASK and 0 < change.probability <= 1 for change in told)


def test_columns_are_counted_from_the_start_of_each_prompt():
    initial = torch.tensor([[0, 0, 3, 7, 7], [1, 2, 3, 7, 7]])
    tracer = Tracer(initial, [2, 0])
    result = sample_left_to_right(
        denoiser,
        initial[:, :3],
        Decoding(max_new_tokens=2),
        mask_token_id=MASK,
        callback=tracer,
    )
    short, long = tracer.trace(0, 3), tracer.trace(1, 5)
    assert (short.initial, long.initial) == ([3, 7, 7], [1, 2, 3, 7, 7])
    assert [short.replay(n)[1:] for n in (1, 2)] == [[int(result[0, 3]), 7], result[0, 3:].tolist()]
    assert long.replay(2) == result[1].tolist()
    assert tracer.trace(1, 4).replay(2) == result[1, :4].tolist()
