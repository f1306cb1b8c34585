"""Forward processes between masked and uniform diffusion, with the weights of their bound."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from megatron_mdm.config.objective import RunFacts
from megatron_mdm.config.section import PositiveFloat
from megatron_mdm.diffusion.forward_process import (
    Corruption,
    ForwardProcess,
    ForwardProcessConfig,
    draw_tokens,
)
from megatron_mdm.diffusion.interpolation import (
    HybridNoise,
    Interpolation,
    Marginals,
    ShiftedNoise,
    UniformNoise,
)
from megatron_mdm.diffusion.noise import FloatArray, IntArray
from megatron_mdm.diffusion.samples import LOG_SNR

# What the bound needs of each position besides its tokens: chances a and b of its time.
CLEAN, UNIFORM = "clean_chance", "uniform_chance"

Weighting = Literal["bound", "dynamic", "log_snr", "clip", "equal"]
# Factors of the time alone move no optimum.
_TIME_FACTORS: dict[str, Callable[[float], float]] = {
    "bound": lambda t: 1.0,
    "dynamic": lambda t: 2 * t * (1 - t),
    "log_snr": lambda t: t * (1 - t),
}


class InterpolatingConfig(ForwardProcessConfig):
    """What processes between masked and uniform diffusion have in common."""

    weighting: Weighting = Field(
        default="dynamic",
        description="Training weights; held-out losses have those of the bound, w. dynamic: "
        "2 t (1 - t) w; log_snr: t (1 - t) w; bound: w itself, whose gradients vary much more; "
        "these keep the optimum. clip: at most max_weight; equal: 1; both move the optimum "
        "(ablations).",
    )
    max_weight: PositiveFloat = Field(default=2.0, description="Greatest weight under clip.")
    eps: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        default=1e-4, description="Times are drawn from (eps, 1 - eps), where weights are finite."
    )

    loss_head: ClassVar[str] = "interpolating"

    @property
    def remark(self) -> str | None:
        """What the training loss is, if not the bound."""
        if self.weighting == "bound":
            return None
        kept = "has the bound's optimum, and another scale"
        if self.weighting not in _TIME_FACTORS:
            kept = "has another optimum than the bound"
        return (
            f"With objective.process.weighting={self.weighting} the training loss {kept}: read the "
            "held-out losses, which are the bound."
        )

    def build(self, run: RunFacts) -> ForwardProcess:
        """Makes the process of a run."""
        num_tokens = run.vocab_size - (run.mask_token_id < run.vocab_size)
        return InterpolatingProcess(
            self.find_noise(num_tokens),
            num_tokens,
            run.mask_token_id,
            self.weighting,
            self.max_weight,
            self.eps,
            tells_log_snr=run.time_embedding,
        )

    @abstractmethod
    def find_noise(self, num_tokens: int) -> Interpolation:
        """The noise for so many tokens of text."""


class UniformConfig(InterpolatingConfig):
    """Uniform diffusion: at time t a share t of the tokens is drawn at random from all."""

    kind: str = Field(default="uniform", description="The forward process.")

    def find_noise(self, num_tokens: int) -> Interpolation:
        """Uniform noise."""
        return UniformNoise(num_tokens)


class HybridConfig(InterpolatingConfig):
    """Masks and random tokens."""

    kind: str = Field(default="hybrid", description="The forward process.")
    p_u: Annotated[float, Field(ge=0)] = Field(
        default=0.1,
        description="Share of tokens that are drawn at random at t = 1/2, below 1; 0: masks alone.",
    )
    gamma: PositiveFloat = Field(
        default=1.0, description="How fast uniform noise comes and goes; at most 2."
    )
    shift: float | None = Field(
        default=None,
        description="In place of p_u and gamma: of the noise at time t a share "
        "sigmoid(ln((1 - t) / t) + shift) is uniform; -1000: masks alone, 1000: no masks.",
    )

    @model_validator(mode="after")
    def _check_noise(self) -> Self:
        if self.p_u >= 1:
            raise ValueError(
                f"objective.process.p_u={self.p_u} leaves no token to be masked: use less than "
                "1, or objective.process.kind=uniform."
            )
        if self.gamma > 2:
            raise ValueError(
                f"objective.process.gamma={self.gamma} would need tokens that jump at negative "
                "rates: use at most 2."
            )
        changed = [name for name in ("p_u", "gamma") if name in self.model_fields_set]
        if self.shift is not None and changed:
            raise ValueError(
                f"objective.process.shift={self.shift} says how much noise is uniform, and "
                f"objective.process.{changed[0]}={getattr(self, changed[0])} does so too: keep one."
            )
        return self

    def find_noise(self, num_tokens: int) -> Interpolation:
        """Hybrid noise, in the form that was chosen."""
        if self.shift is not None:
            return ShiftedNoise(num_tokens, self.shift)
        return HybridNoise(num_tokens, self.p_u, self.gamma)


@dataclass(frozen=True)
class InterpolatingProcess(ForwardProcess):
    """Replaces tokens by random ones and by masks.

    Attributes:
        noise: Chances and weights at each time.
        num_tokens: Tokens of text, N; ids from 0 without the mask token's.
        mask_token_id: Input id of the mask token.
        weighting: Training weights.
        max_weight: Greatest weight under `clip`.
        eps: Times lie in (eps, 1 - eps).
        tells_log_snr: Tell the model the log-SNR of a text's noise.

    Source:
        arXiv 2503.04482.
    """

    noise: Interpolation
    num_tokens: int
    mask_token_id: int
    weighting: Weighting = "bound"
    max_weight: float = 2.0
    eps: float = 1e-4
    tells_log_snr: bool = False

    def corrupt(self, x0_L: IntArray, t: float, uniforms_N: FloatArray) -> Corruption:
        """Corrupts a text, with training weights."""
        time = self.eps + (1 - 2 * self.eps) * t
        at = self.noise.at(time)
        xt_L = self._draw(x0_L, at, uniforms_N)
        weights_L = self._weigh(x0_L, xt_L, at)
        if self.weighting == "clip":
            weights_L = np.minimum(weights_L, self.max_weight)
        elif self.weighting == "equal":
            weights_L = np.ones_like(weights_L)
        else:
            weights_L = weights_L * _TIME_FACTORS[self.weighting](time)
        return self._tell_of_time(xt_L, weights_L, at)

    def corrupt_held_out(self, x0_L: IntArray, t: float, uniforms_N: FloatArray) -> Corruption:
        """Corrupts a text, with the weights of the bound, at early times more often.

        A wrong token weighs about 1 / t, so nearly all variance comes from early times: u^3 with
        u uniform, at the weight 3 u^2, has about an eighth of it.
        """
        at = self.noise.at(self.eps + (1 - 2 * self.eps) * t**3)
        xt_L = self._draw(x0_L, at, uniforms_N)
        return self._tell_of_time(xt_L, 3 * t**2 * self._weigh(x0_L, xt_L, at), at)

    def mean_share(self) -> float:
        """All tokens are judged, for none is known to be right."""
        return 1.0

    def draw_prior(self, uniforms_L: FloatArray) -> IntArray:
        """Masks or random tokens, as they are at the end."""
        at = self.noise.at(1 - self.eps)
        return self._replace(at.mask + self.num_tokens * at.uniform, at, uniforms_L)

    def step_back(
        self,
        xt_L: IntArray,
        probabilities_LV: NDArray[np.float64],
        t: float,
        s: float,
        uniforms_N: FloatArray,
    ) -> IntArray:
        """Keeps each token, or draws what it was at time s from what the model says.

        Args:
            xt_L: Tokens at time t, int64 [L].
            probabilities_LV: Of each clean token given all other positions, float64 [L, V].
            t: Time in (0, 1].
            s: Earlier time, in [0, t); at 0 the text is clean.
            uniforms_N: float64 [2 * L].

        Returns:
            Tokens at time s, int64 [L].

        Source:
            p(z_s | z_t) = q(z_t | z_s) q_s(z_s) / q_t(z_t), where q_s and q_t are averaged over
            the model's clean token.
        """
        later = self.noise.at(min(t, 1 - self.eps))
        earlier = self.noise.at(s) if s > 0 else Marginals(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        decides_L, becomes_L = np.split(uniforms_N, 2)
        is_mask_L = xt_L == self.mask_token_id
        places = np.arange(len(xt_L))
        clean_L = np.where(is_mask_L, 0.0, probabilities_LV[places, np.where(is_mask_L, 0, xt_L)])

        def chance(at: Marginals) -> FloatArray:
            return np.where(is_mask_L, at.mask, at.clean * clean_L + at.uniform)

        keeps_L = later.clean / earlier.clean * chance(earlier) / chance(later)
        drawn_L = draw_tokens(probabilities_LV, becomes_L / max(earlier.clean, 1e-300) % 1.0)
        redrawn_L = self._draw(drawn_L, earlier, becomes_L)
        return np.where(decides_L < keeps_L, xt_L, redrawn_L)

    def _draw(self, x0_L: IntArray, at: Marginals, uniforms_L: FloatArray) -> IntArray:
        """Corrupts by one draw a token: it is left alone, or what the rest of the draw says."""
        noisy_L = self._replace(1 - at.clean, at, (uniforms_L - at.clean) / (1 - at.clean or 1.0))
        return np.where(uniforms_L < at.clean, x0_L, noisy_L)

    def _replace(self, noise: float, at: Marginals, uniforms_L: FloatArray) -> IntArray:
        """Draws random tokens and masks, in the proportion of a time."""
        share = self.num_tokens * at.uniform / (noise or 1.0)
        number_L = np.clip(uniforms_L / (share or 1.0) * self.num_tokens, 0, self.num_tokens - 1)
        token_L = number_L.astype(np.int64)
        token_L += token_L >= self.mask_token_id
        return np.where(uniforms_L < share, token_L, self.mask_token_id)

    def _weigh(self, x0_L: IntArray, xt_L: IntArray, at: Marginals) -> FloatArray:
        weights_L = np.where(xt_L == x0_L, at.right_weight, at.wrong_weight)
        return np.where(xt_L == self.mask_token_id, at.mask_weight, weights_L)

    def _tell_of_time(self, xt_L: IntArray, weights_L: FloatArray, at: Marginals) -> Corruption:
        chances = {CLEAN: at.clean, UNIFORM: at.uniform}
        told = {name: np.full(len(xt_L), value) for name, value in chances.items()}
        log_snr = {LOG_SNR: np.array([at.log_snr], np.float32)} if self.tells_log_snr else {}
        return Corruption(xt_L, weights_L, told, log_snr)


def describe_process(noise: Interpolation) -> dict[str, Any]:
    """Describes noise as the section `objective.process` does."""
    if isinstance(noise, HybridNoise):
        return {"kind": "hybrid", "p_u": noise.p_u, "gamma": noise.gamma}
    if isinstance(noise, ShiftedNoise):
        return {"kind": "hybrid", "shift": noise.shift}
    return {"kind": "uniform"}
