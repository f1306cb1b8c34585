"""Interpolating noise: at each time a token is itself, a uniformly drawn one, or the mask token.

`q_t(z | x0) = a [z = x0] + b [z is a token of text] + m [z is the mask token]`, with N tokens of
text and a + N b + m = 1. Masked diffusion has b = 0, uniform diffusion m = 0.

The weight of a position in the bound is `w = d/dt ln(q_t(z) / a)` for what z is: the rate at which
tokens jump to z, over the chance to find it there.

The file travels with every Hugging Face export, and imports nothing else of ours.

Source:
    arXiv 2503.04482 (hybrid noise), 2512.10858 (its form in the log of the signal-to-noise ratio).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

# Numbers that a log-SNR becomes before a model embeds it (`time_features.py`).
NUM_TIME_FEATURES = 64


class Marginals(NamedTuple):
    """What becomes of a token at a time, and the weights of the bound.

    Attributes:
        clean: Chance that it is left alone, a.
        uniform: Chance of each token of text to be drawn in its place, b.
        mask: Chance that it is masked, m.
        mask_weight: Weight of a position that is masked.
        wrong_weight: Weight of a position that shows another token than the clean one.
        right_weight: Weight of a position that shows the clean one.
    """

    clean: float
    uniform: float
    mask: float
    mask_weight: float
    wrong_weight: float
    right_weight: float

    @property
    def log_snr(self) -> float:
        """Log of the signal-to-noise ratio, ln(a / (1 - a)); a below 1."""
        return math.log(self.clean) - math.log1p(-self.clean)


class Interpolation(Protocol):
    """Chances and weights at each time."""

    def at(self, t: float) -> Marginals:
        """Those of a time in (0, 1)."""
        ...


@dataclass(frozen=True)
class HybridNoise:
    """Masks with some uniform noise, most of it in the middle.

    Attributes:
        num_tokens: Tokens of text, N.
        p_u: Share of tokens that are uniform noise at t = 1/2, in [0, 1); 0 is masked diffusion.
        gamma: How fast the uniform noise comes and goes, in (0, 2].

    Source:
        arXiv 2503.04482, section 3: with c = B (t (1 - t))^(gamma / 2), B = 2^gamma p_u / (1 - p_u)
        the chances are (1 - t, c / N, t) / (1 + c).
    """

    num_tokens: int
    p_u: float
    gamma: float = 1.0

    def at(self, t: float) -> Marginals:
        """Those of a time in (0, 1)."""
        strength = 2**self.gamma * self.p_u / (1 - self.p_u)
        c = strength * (t * (1 - t)) ** (self.gamma / 2)
        slope = 1 / (t * (1 - t))
        wrong = (self.gamma * (1 - 2 * t) + 2 * t) / 2 * slope
        clean, uniform = (1 - t) / (1 + c), c / (self.num_tokens * (1 + c))
        return _with_right_weight(clean, uniform, t / (1 + c), slope, wrong)


@dataclass(frozen=True)
class ShiftedNoise:
    """Uniform noise at the noisy end and masks at the clean one, or the other way round.

    Attributes:
        num_tokens: Tokens of text, N.
        shift: Where one turns into the other: -1000 is masked diffusion, 1000 uniform diffusion.

    Source:
        arXiv 2512.10858: of the noise t a share sigmoid(ln((1 - t) / t) + shift) is uniform.
    """

    num_tokens: int
    shift: float

    def at(self, t: float) -> Marginals:
        """Those of a time in (0, 1)."""
        share = sigmoid(log_signal_to_noise(t) + self.shift)
        slope = 1 / (t * (1 - t))
        uniform, mask = t * share / self.num_tokens, t * (1 - share)
        return _with_right_weight(1 - t, uniform, mask, (1 + share) * slope, share * slope)


@dataclass(frozen=True)
class UniformNoise:
    """Tokens become random ones; there is no mask token.

    Attributes:
        num_tokens: Tokens of text, N.

    Source:
        arXiv 2412.10193, 2506.10892.
    """

    num_tokens: int

    def at(self, t: float) -> Marginals:
        """Those of a time in (0, 1)."""
        slope = 1 / (t * (1 - t))
        return _with_right_weight(1 - t, t / self.num_tokens, 0.0, slope, slope)


_KINDS: dict[str, type] = {"hybrid": HybridNoise, "shifted": ShiftedNoise, "uniform": UniformNoise}


def describe_noise(noise: Interpolation) -> dict[str, Any]:
    """Describes noise as JSON can hold it."""
    kind = next(name for name, one in _KINDS.items() if isinstance(noise, one))
    return {"kind": kind, **vars(noise)}


def read_noise(fields: Mapping[str, Any]) -> Interpolation:
    """Reads what `describe_noise` wrote.

    Raises:
        ValueError: There is no such noise.
    """
    told = dict(fields)
    kind = told.pop("kind", None)
    try:
        noise: Interpolation = _KINDS[kind](**told)
    except (KeyError, TypeError):
        raise ValueError(f"{dict(fields)} describes no noise: use {', '.join(_KINDS)}.") from None
    return noise


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)), for any value."""
    small = math.exp(-abs(value))
    return 1 / (1 + small) if value >= 0 else small / (1 + small)


def log_signal_to_noise(t: float) -> float:
    """ln((1 - t) / t)."""
    return math.log1p(-t) - math.log(t)


def _with_right_weight(
    clean: float, uniform: float, mask: float, mask_weight: float, wrong_weight: float
) -> Marginals:
    right_weight = wrong_weight * uniform / (clean + uniform)
    return Marginals(clean, uniform, mask, mask_weight, wrong_weight, right_weight)
