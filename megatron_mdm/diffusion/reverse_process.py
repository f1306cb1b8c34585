"""Sampling of any forward process: from time 1 to time 0, one step back after the other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.diffusion.forward_process import ForwardProcess
from megatron_mdm.diffusion.noise import CounterNoise, IntArray, Purpose

# From tokens [L] to the probabilities of the clean ones [L, V]; 0 for what is no text.
Restore = Callable[[IntArray], NDArray[np.float64]]


def sample_reverse(
    process: ForwardProcess,
    restore: Restore,
    noise: CounterNoise,
    *,
    length: int,
    num_steps: int,
    prompt: IntArray | None = None,
) -> IntArray:
    """Draws a text.

    Args:
        process: The forward process that the model was trained to reverse.
        restore: The model: probabilities of the clean tokens.
        noise: Source of draws; another seed gives another text.
        length: Tokens of the text, L, the prompt's included.
        num_steps: Steps from time 1 to 0, each one forward pass.
        prompt: First tokens, which stay as they are.

    Returns:
        Tokens, int64 [L].

    Source:
        arXiv 2107.03006, section 3: ancestral sampling, where p(x_s | x_t) is the process's step
        back averaged over what the model says of x_0.
    """
    given = np.zeros(0, dtype=np.int64) if prompt is None else prompt
    x_L = process.draw_prior(noise.uniforms(Purpose.STEP_BACK, 0, length))
    x_L[: len(given)] = given
    for step in range(num_steps):
        later, earlier = 1.0 - step / num_steps, 1.0 - (step + 1) / num_steps
        uniforms_N = noise.uniforms(Purpose.STEP_BACK, step + 1, 2 * length)
        x_L = process.step_back(x_L, restore(x_L), later, earlier, uniforms_N)
        x_L[: len(given)] = given
    return x_L
