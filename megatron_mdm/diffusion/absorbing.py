"""Absorbing diffusion: tokens are masked, and a masked token stays so until it is unmasked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

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
from megatron_mdm.diffusion.masking import (
    Masking,
    bernoulli_masking,
    fixed_count_masking,
    masking_probability,
)
from megatron_mdm.diffusion.noise import FloatArray, IntArray
from megatron_mdm.diffusion.schedules import LINEAR, Cosine, Linear, NoiseSchedule, Polynomial

_SCHEDULES: dict[str, type[NoiseSchedule]] = {"linear": Linear, "cosine": Cosine}


class AbsorbingConfig(ForwardProcessConfig):
    """Absorbing diffusion: at time t a share m(t) = 1 - alpha_t of the tokens is masked."""

    kind: str = Field(default="absorbing", description="The forward process.")
    masking: Literal["bernoulli", "fixed_count"] = Field(
        default="bernoulli",
        description="bernoulli: every token masked with probability p (the papers'); "
        "fixed_count: exactly l ~ U{1..L} tokens masked, same expectation, lower variance.",
    )
    eps: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=1e-3, description="Least masking probability: p = (1 - eps) t + eps."
    )
    noise_schedule: Literal["linear", "cosine", "polynomial"] = Field(
        default="linear",
        description="Share masked at time t, with the weight m'(t) / m(t) that keeps the bound. "
        "linear: m = t; cosine: 1 - cos(pi t / 2); polynomial: t^schedule_power.",
    )
    schedule_power: PositiveFloat = Field(
        default=2.0, description="Power of the polynomial schedule."
    )
    t_min: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="Least t that is drawn. Above 0 the training loss is no bound; the held-out "
        "loss is.",
    )
    t_max: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Greatest t that is drawn. Below 1 the same."
    )
    weighting: Literal["bound", "equal"] = Field(
        default="bound",
        description="Weights of masked tokens. bound: those of the bound; equal: all the same, "
        "the mean cross-entropy of masked tokens (an ablation).",
    )

    hides_tokens: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check_times(self) -> Self:
        if self.t_min >= self.t_max:
            raise ValueError(
                f"objective.process.t_min={self.t_min} is not below objective.process.t_max="
                f"{self.t_max}: give a range of times."
            )
        return self

    def build(self, run: RunFacts) -> AbsorbingProcess:
        """Makes the process of a run."""
        range_and_weights = {name: getattr(self, name) for name in ("t_min", "t_max", "weighting")}
        schedule: NoiseSchedule
        if self.noise_schedule == "polynomial":
            schedule = Polynomial(power=self.schedule_power, **range_and_weights)
        else:
            schedule = _SCHEDULES[self.noise_schedule](**range_and_weights)
        return AbsorbingProcess(
            run.mask_token_id, self.masking == "fixed_count", self.eps, schedule
        )


@dataclass(frozen=True)
class AbsorbingProcess(ForwardProcess):
    """Masks tokens.

    Attributes:
        mask_token_id: Input id of the mask token.
        fixed_count: Mask exactly l tokens instead of each with probability p.
        eps: Least masking probability of the Bernoulli form.
        schedule: Share that is masked at each time, and weights.

    Source:
        arXiv 2410.18514, section 2.
    """

    mask_token_id: int
    fixed_count: bool = False
    eps: float = 1e-3
    schedule: NoiseSchedule = LINEAR

    def corrupt(self, x0_L: IntArray, t: float, uniforms_N: FloatArray) -> Corruption:
        """Masks tokens by the form and the schedule that the run trains with."""
        time = self.schedule.time(t)
        if self.fixed_count:
            return self._mask(x0_L, fixed_count_masking(uniforms_N, time, self.schedule))
        return self._mask(x0_L, bernoulli_masking(uniforms_N, time, self.eps, self.schedule))

    def corrupt_held_out(self, x0_L: IntArray, t: float, uniforms_N: FloatArray) -> Corruption:
        """Masks tokens by the fixed-count form, whatever the run trains with."""
        return self._mask(x0_L, fixed_count_masking(uniforms_N, t))

    def mean_share(self) -> float:
        """Mean share of tokens that are masked; fixed counts mask half a token per text more."""
        share = self.schedule.mean_share()
        return share if self.fixed_count else masking_probability(share, self.eps)

    def mean_count(self, length: float) -> float:
        """Mean number of masked tokens of a text.

        Args:
            length: Tokens, or their mean over texts.

        Returns:
            ((1 - eps) m + eps) L with Bernoulli masks, where m is the mean masked share, 1/2 for
            the linear schedule. With fixed counts (L + 1) / 2 for l ~ U{1..L}, exactly; for other
            schedules the mean count of a text of the mean length.
        """
        if not self.fixed_count:
            return self.mean_share() * length
        if self.schedule == LINEAR:
            return (length + 1) / 2
        return self.schedule.mean_count(round(length))

    def draw_prior(self, uniforms_L: FloatArray) -> IntArray:
        """All tokens are masked."""
        return np.full(len(uniforms_L), self.mask_token_id, dtype=np.int64)

    def step_back(
        self,
        xt_L: IntArray,
        probabilities_LV: NDArray[np.float64],
        t: float,
        s: float,
        uniforms_N: FloatArray,
    ) -> IntArray:
        """Unmasks each token with probability (alpha_s - alpha_t) / (1 - alpha_t).

        With m = 1 - alpha that is (m(t) - m(s)) / m(t).

        Source:
            arXiv 2406.07524, equation 7, for a schedule with m(0) = 0 and m(1) = 1.
        """
        length = len(xt_L)
        later, earlier = self.schedule.masked_share(t), self.schedule.masked_share(s)
        unmasks_L = (xt_L == self.mask_token_id) & (uniforms_N[:length] * later < later - earlier)
        return np.where(unmasks_L, draw_tokens(probabilities_LV, uniforms_N[length:]), xt_L)

    def _mask(self, x0_L: IntArray, masking: Masking) -> Corruption:
        return Corruption(
            np.where(masking.mask_L, self.mask_token_id, x0_L),
            np.where(masking.mask_L, masking.weight, 0.0),
        )
