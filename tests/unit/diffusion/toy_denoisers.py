"""Denoisers whose answers are known, and counts of what a sampler makes of them."""

from __future__ import annotations

import torch

from megatron_mdm.diffusion.decoding import Decoding
from megatron_mdm.diffusion.samplers import sample

V, MASK = 7, 7


class ToyDenoiser:
    """Logits from a table over the token and its two neighbours: bit-equal for any batch.

    Every sequence is judged on its own. The columns beyond V (and V = the mask itself) have high
    logits, so a sampler that does not forbid them fails.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.table = 2 * torch.randn(3, V + 1, V + 3, generator=generator)
        self.calls = 0

    def __call__(self, x_BS):
        self.calls += 1
        left, right = x_BS.roll(1, dims=1), x_BS.roll(-1, dims=1)
        logits = self.table[0][left] + self.table[1][x_BS] + self.table[2][right]
        logits[..., V:] += 50
        return logits


def run(rows, seeds=None, callback=None, **options):
    denoiser = ToyDenoiser()
    decoding = Decoding(**({"num_steps": 4} | options))
    given = {"mask_token_id": MASK, "vocab_size": V, "seeds": seeds, "callback": callback}
    return sample(denoiser, torch.tensor(rows), decoding, **given), denoiser.calls


def exact_denoiser(joint, mask):
    """Conditionals p(x_i | visible tokens) of a joint distribution [v, v, v] over three tokens."""

    def denoise(x_BS):
        rows = []
        for x in x_BS.tolist():
            seen = torch.zeros_like(joint)
            index = tuple(slice(None) if token == mask else slice(token, token + 1) for token in x)
            seen[index] = joint[index]
            others = [(1, 2), (0, 2), (0, 1)]
            rows.append(torch.stack([seen.sum(dims) for dims in others]).log())
        return torch.stack(rows)

    return denoise


def frequencies(joint, num_samples, **options):
    v = joint.shape[0]
    counts = torch.zeros(v**3)
    x_BS = torch.full((num_samples, 3), v)
    decoding = Decoding(temperature=1.0, **options)
    filled = sample(exact_denoiser(joint, v), x_BS, decoding, mask_token_id=v)
    flat = filled[:, 0] * v * v + filled[:, 1] * v + filled[:, 2]
    return counts.index_add(0, flat, torch.ones(num_samples))


def chi_square(counts, probs):
    expected = probs.flatten() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


JOINT = torch.tensor([[[8.0, 1.0], [1.0, 2.0]], [[1.0, 3.0], [4.0, 6.0]]]) / 26
