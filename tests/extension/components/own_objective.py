"""An objective from outside the package: restore the end of a window, given its beginning."""

from dataclasses import dataclass

import numpy as np
from pydantic import Field

from megatron_mdm.config.objective import ObjectiveConfig, RunFacts
from megatron_mdm.diffusion.attention_rules import FullAttention
from megatron_mdm.diffusion.forward_process import Corruption
from megatron_mdm.diffusion.noise import CounterNoise, Purpose
from megatron_mdm.diffusion.samples import Objective, Sample, TextWindow, corrupted_sample


class SuffixConfig(ObjectiveConfig):
    """Restore a suffix of random length; tokens see those at most `width` places away."""

    width: int = Field(default=8, gt=0, description="Places to either side that a token sees.")

    def build(self, run: RunFacts) -> Objective:
        return SuffixObjective(CounterNoise(run.seed), run.mask_token_id, self.width)


@dataclass(frozen=True)
class LocalAttention(FullAttention):
    width: int

    def pair(self, model_inputs, seq_length):
        width = self.width
        return lambda sequence, head, query, key: (query - key).abs() <= width


@dataclass(frozen=True)
class SuffixObjective(Objective):
    noise: CounterNoise
    mask_token_id: int
    width: int

    @property
    def attention(self) -> FullAttention:
        return LocalAttention(self.width)

    def sample(self, window: TextWindow, position: int) -> Sample:
        size = len(window.tokens_S)
        draw = self.noise.uniform(Purpose.LENGTH, position)
        return self._hide(window, 1 + int(draw * (size - 1)))

    def held_out_sample(self, window: TextWindow, kind, draw) -> Sample:
        return self._hide(window, len(window.tokens_S) // 2)

    def count_predictions(self, window: TextWindow) -> int:
        return len(window.tokens_S)

    def predicted_share(self, seq_length: int, learned_share: float = 1.0) -> float:
        return 0.5

    def _hide(self, window: TextWindow, first: int) -> Sample:
        size = len(window.tokens_S)
        hidden_S = np.arange(size) >= first
        xt_S = np.where(hidden_S, self.mask_token_id, window.tokens_S)
        return corrupted_sample(window, Corruption(xt_S, hidden_S * (size / (size - first))))
