"""A forward process from outside the package: a share t of the tokens become random ones."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megatron_mdm.config.objective import RunFacts
from megatron_mdm.diffusion.forward_process import (
    Corruption,
    ForwardProcess,
    ForwardProcessConfig,
    draw_tokens,
)


class UniformConfig(ForwardProcessConfig):
    """Uniform diffusion."""

    def build(self, run: RunFacts) -> ForwardProcess:
        return UniformProcess(run.vocab_size)


@dataclass(frozen=True)
class UniformProcess(ForwardProcess):
    vocab_size: int

    # One says whether a token changes, one what it becomes.
    uniforms_per_token: ClassVar[int] = 2
    uses_mask_token: ClassVar[bool] = False

    def corrupt(self, x0_L, t, uniforms_N):
        changes_L, becomes_L = uniforms_N.reshape(2, -1)
        xt_L = np.where(changes_L < t, (becomes_L * self.vocab_size).astype(np.int64), x0_L)
        return Corruption(xt_L, np.ones(len(x0_L)))

    def mean_share(self):
        return 1.0

    def draw_prior(self, uniforms_L):
        return (uniforms_L * self.vocab_size).astype(np.int64)

    def step_back(self, xt_L, probabilities_LV, t, s, uniforms_N):
        """p(x_s | x_t), averaged over the clean token: Bayes' rule with a_t = 1 - t."""
        size, a_t, a_s = self.vocab_size, 1 - t, 1 - s
        is_here_LV = np.arange(size) == xt_L[:, None]
        # q(x_t | x_0) for each clean token, and q(x_t | x_s) for each earlier one.
        from_clean_LV = a_t * is_here_LV + (1 - a_t) / size
        from_earlier_LV = a_t / a_s * is_here_LV + (1 - a_t / a_s) / size
        ratio_LV = probabilities_LV / from_clean_LV
        earlier_LV = a_s * ratio_LV + (1 - a_s) / size * ratio_LV.sum(axis=1, keepdims=True)
        return draw_tokens(from_earlier_LV * earlier_LV, uniforms_N[: len(xt_L)])
