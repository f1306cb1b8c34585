"""Estimators of log p(continuation | context): what to mask in each forward pass, how to add up.

A probe masks some tokens of the continuation; its value is the weighted sum of the
log-probabilities that the model then gives to them. Three estimators choose probes:

- `fixed_count` and `monte_carlo` estimate the bound of masked diffusion on log p, from random
  masks: exactly l tokens, or each with probability p. The first is exact, without any noise, if the
  draws suffice for every possible mask of the continuation.
- `chain_rule` goes from left to right: the j-th probe masks the tokens from j on and predicts the
  j-th. It is exact for the order that it reads in, which is not the bound.

Models of hybrid and uniform noise have a bound of their own, `process` (`noise_probes.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.core.statistics import Estimate, degrees_of_differences
from megatron_mdm.diffusion.absorbing import AbsorbingProcess
from megatron_mdm.diffusion.noise import CounterNoise, Purpose

EstimatorKind = Literal["fixed_count", "monte_carlo", "chain_rule", "process"]

# Keeps these draws apart from those of training and validation with the same seed.
SCORING_DOMAIN = 2


class Probe(NamedTuple):
    """One forward pass over context and continuation.

    Attributes:
        hidden_L: Bool [L], the tokens of the continuation that are masked.
        weights_L: float64 [L], of their log-probabilities; 0 where one does not count.
        shown_L: int64 [L], what the model sees of the continuation; None: what is not masked.
        chances: Of the noise at the probe's time, that a token is left alone and that it becomes
            any one other; None: masks alone.
        log_snr: Of the noise at that time; None: masks alone.
    """

    hidden_L: NDArray[np.bool_]
    weights_L: NDArray[np.float64]
    shown_L: NDArray[np.int64] | None = None
    chances: tuple[float, float] | None = None
    log_snr: float | None = None


@dataclass(frozen=True)
class LikelihoodEstimator:
    """Which probes to make, in rounds, until the estimate is good enough.

    Attributes:
        kind: See the module.
        draws: Random masks per round.
        stratified: Spread t evenly over the draws of a round; False: independent t.
        eps: Least masking probability of `monte_carlo`. It moves the bound by a share of no more
            than about eps; without it the variance would be infinite.
    """

    kind: EstimatorKind
    draws: int = 128
    stratified: bool = True
    eps: float = 1e-3

    def is_exact(self, length: int) -> bool:
        """Does one round leave no noise?

        Args:
            length: Tokens of the continuation, L.
        """
        return self.kind == "chain_rule" or (
            self.kind == "fixed_count" and length < 63 and 2**length - 1 <= self.draws
        )

    def draw_probes(
        self, noise: CounterNoise, continuation: Sequence[int], number: int
    ) -> list[Probe]:
        """Draws the probes of a round.

        Args:
            noise: Of the request.
            continuation: Token ids, L of them, at least 1.
            number: Of the round, from 0.

        Returns:
            As many as `draws`, or all that there are for an exact estimate.
        """
        length = len(continuation)
        if self.kind == "chain_rule":
            return [_make_next_token_probe(place, length) for place in range(length)]
        if self.is_exact(length):
            return _list_all_masks(length)
        # The mask does not depend on the tokens: zeros stand for them, and 1 for the mask token.
        is_fixed = self.kind == "fixed_count"
        process = AbsorbingProcess(mask_token_id=1, fixed_count=is_fixed, eps=self.eps)
        first, zeros_L = number * self.draws, np.zeros(length, dtype=np.int64)
        found = [
            process.corrupt(
                zeros_L, float(time), noise.uniforms(Purpose.MASK, first + draw, length)
            )
            for draw, time in enumerate(self._draw_times(noise, number))
        ]
        return [Probe(one.xt_L == 1, one.weights_L) for one in found]

    def combine(self, length: int, rounds: Sequence[NDArray[np.float64]]) -> Estimate:
        """Adds up the values of the probes.

        Args:
            length: Tokens of the continuation, L.
            rounds: Values of the probes of each round, in their order, each float64 [K].

        Returns:
            log p in nats, with its standard error: 0 for an exact estimate.
        """
        if self.is_exact(length):
            return Estimate(float(rounds[0].sum()), 0.0)
        mean = float(np.mean([values.mean() for values in rounds]))
        variances = [self._variance_of_mean(values) for values in rounds]
        return Estimate(mean, math.sqrt(sum(variances)) / len(rounds))

    def degrees_of_freedom(self, length: int, num_rounds: int) -> float:
        """Degrees of freedom of the standard error, for intervals (`student_reach`).

        Args:
            length: Tokens of the continuation, L.
            num_rounds: Rounds that were combined.

        Returns:
            The sum over rounds, whose variances estimate the same one; infinite for an exact
            estimate, 0 where a round is a single draw.
        """
        if self.is_exact(length):
            return math.inf
        if self.draws < 2:
            return 0.0
        of_round = degrees_of_differences(self.draws) if self.stratified else self.draws - 1
        return num_rounds * of_round

    def _draw_times(self, noise: CounterNoise, number: int) -> NDArray[np.float64]:
        if not self.stratified:
            return 1.0 - noise.uniforms(Purpose.TIME, number, self.draws)
        offset = noise.uniform(Purpose.TIME, number)
        # In (0, 1], ascending: neighbours in the list are neighbours in t.
        return (np.arange(self.draws) + 1.0 - offset) / self.draws

    def _variance_of_mean(self, values_K: NDArray[np.float64]) -> float:
        count = len(values_K)
        if count < 2:
            return math.nan
        if not self.stratified:
            return float(values_K.var(ddof=1)) / count
        # One draw per stratum: neighbours have nearly the same t and independent noise.
        differences = np.diff(values_K)
        return float(differences @ differences) / (2 * (count - 1)) / count


def make_request_noise(
    seed: int, context: Sequence[int], continuation: Sequence[int]
) -> CounterNoise:
    """Makes the noise of a request, which does not depend on other requests or on their order.

    Args:
        seed: Of the evaluation.
        context: Token ids.
        continuation: Token ids.

    Returns:
        The source of its draws.
    """
    digest = blake2b(digest_size=16)
    for part in (context, continuation):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(np.asarray(part, dtype="<i8").tobytes())
    return CounterNoise((seed << 128) | int.from_bytes(digest.digest(), "little"), SCORING_DOMAIN)


def _make_next_token_probe(place: int, length: int) -> Probe:
    places_L = np.arange(length)
    return Probe(places_L >= place, (places_L == place).astype(np.float64))


def _list_all_masks(length: int) -> list[Probe]:
    # l is uniform over 1..L and so is the mask given l; L / l weighs it, as in a draw.
    found = []
    for bits in itertools.product((False, True), repeat=length):
        count = sum(bits)
        if count:
            hidden_L = np.array(bits)
            found.append(Probe(hidden_L, hidden_L / (count * math.comb(length, count))))
    return found
