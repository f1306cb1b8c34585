"""The bound of hybrid and uniform noise on log p(continuation | context), from random corruptions.

A probe corrupts the continuation as the noise does at a time; its value is the weighted sum of what
the bound takes at each token. Times are stratified, and early ones drawn more often, as in
validation (`InterpolatingProcess.corrupt_held_out`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_mdm.diffusion.interpolating import CLEAN, UNIFORM, InterpolatingProcess
from megatron_mdm.diffusion.interpolation import Interpolation
from megatron_mdm.diffusion.noise import CounterNoise, Purpose
from megatron_mdm.diffusion.probes import LikelihoodEstimator, Probe
from megatron_mdm.diffusion.samples import LOG_SNR


class NoiseEstimator(LikelihoodEstimator):
    """Probes of a model whose noise is not masks alone.

    Args:
        noise: Of its training.
        num_tokens: Tokens of text.
        mask_token_id: Id of the mask token.
        draws: Random corruptions per round.
        stratified: Spread t evenly over the draws of a round; False: independent t.
    """

    def __init__(
        self,
        noise: Interpolation,
        num_tokens: int,
        mask_token_id: int,
        draws: int = 128,
        *,
        stratified: bool = True,
    ) -> None:
        super().__init__("process", draws, stratified)
        self._process = InterpolatingProcess(noise, num_tokens, mask_token_id, tells_log_snr=True)

    def draw_probes(
        self, noise: CounterNoise, continuation: Sequence[int], number: int
    ) -> list[Probe]:
        """Draws the probes of a round.

        Args:
            noise: Of the request.
            continuation: Token ids, L of them, at least 1.
            number: Of the round, from 0.

        Returns:
            As many as `draws`.
        """
        x0_L, first = np.array(continuation, dtype=np.int64), number * self.draws
        probes = []
        for draw, time in enumerate(self._draw_times(noise, number)):
            uniforms_L = noise.uniforms(Purpose.MASK, first + draw, len(x0_L))
            found = self._process.corrupt_held_out(x0_L, float(time), uniforms_L)
            chances = (found.loss_inputs[CLEAN][0], found.loss_inputs[UNIFORM][0])
            hidden_L = found.xt_L == self._process.mask_token_id
            log_snr = float(found.model_inputs[LOG_SNR][0])
            probes.append(Probe(hidden_L, found.weights_L, found.xt_L, chances, log_snr))
        return probes
