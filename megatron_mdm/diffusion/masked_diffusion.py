"""Masked diffusion over whole windows: restore tokens that a forward process corrupted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from megatron_mdm.config.component import build_component
from megatron_mdm.config.data import DataConfig
from megatron_mdm.config.finetuning import FinetuningConfig
from megatron_mdm.config.objective import ObjectiveConfig, RunFacts, refuse_with_responses
from megatron_mdm.config.section import NonNegativeInt
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.diffusion.annealing import WideningAttention
from megatron_mdm.diffusion.attention_rules import FULL_ATTENTION, FullAttention
from megatron_mdm.diffusion.forward_process import (
    CHOSEN_PROCESS,
    ForwardProcess,
    ForwardProcessConfig,
)
from megatron_mdm.diffusion.interpolation import Interpolation
from megatron_mdm.diffusion.left_to_right import LeftToRight
from megatron_mdm.diffusion.lengths import LengthSampler, Ratio
from megatron_mdm.diffusion.noise import CounterNoise, Purpose, TimeSampler
from megatron_mdm.diffusion.responses import ResponseDiffusionObjective
from megatron_mdm.diffusion.samples import (
    HeldOutDraw,
    LossKind,
    Objective,
    Sample,
    TextWindow,
    corrupted_sample,
    find_places_after_first,
    list_segments,
    refuse_mask_token,
    spread_loss_inputs,
)


class MaskedDiffusionConfig(ObjectiveConfig):
    """Masked diffusion: restore tokens that were masked at random, at every rate."""

    kind: str = Field(default="mdm", description="Masked diffusion.")
    process: Annotated[ForwardProcessConfig, CHOSEN_PROCESS] = Field(
        default_factory=CHOSEN_PROCESS.read_default, description="What corrupts tokens."
    )
    time_sampling: Literal["low_discrepancy", "iid"] = Field(
        default="low_discrepancy",
        description="t stratified over the global batch, or independent for each sample.",
    )
    noise: Literal["fresh", "repeated"] = Field(
        default="fresh",
        description="fresh: new t and mask at each visit of a window; repeated: the same ones at "
        "every visit, t stratified over windows (an ablation).",
    )
    left_to_right_ratio: Ratio = Field(
        default=0.0,
        description="Share of samples whose last tokens are masked instead of as many random ones "
        "(an ablation).",
    )
    stochastic_length_ratio: Ratio = Field(
        default=0.0, description="Share of samples cut to a length drawn from U{1..seq_length}."
    )
    attention_annealing_steps: NonNegativeInt = Field(
        default=0,
        description="Optimizer steps in which attention widens from causal to full, for a model "
        "that begins with the weights of a causal one; 0: full from the start.",
    )

    trains: ClassVar[str] = "a masked-diffusion language model"
    learns_responses: ClassVar[bool] = True
    fills_responses: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _choose_loss_head(cls, fields: Any) -> Any:
        """Chooses the loss head of the process where none is named."""
        if not isinstance(fields, Mapping) or "loss_head" in fields:
            return fields
        process = CHOSEN_PROCESS.read(fields.get("process", {}))
        return {**fields, "loss_head": {"kind": process.loss_head}}

    @model_validator(mode="after")
    def _check_left_to_right(self) -> Self:
        if self.left_to_right_ratio and not self.process.hides_tokens:
            raise ValueError(
                f"objective.left_to_right_ratio={self.left_to_right_ratio} masks last tokens, and "
                f"objective.process.kind={self.process.kind} does not mask alone: leave it out."
            )
        return self

    @property
    def held_out_head(self) -> str:
        """That of the process."""
        return self.process.loss_head

    @property
    def remark(self) -> str | None:
        """That of the process."""
        return self.process.remark

    @property
    def runs_as(self) -> Literal["mdm", "ar"] | None:
        """Takes noise back where it is of a kind that exports know."""
        is_known = self.process.hides_tokens or self.process.find_noise(1) is not None
        return "mdm" if is_known else None

    def find_noise(self, num_tokens: int) -> Interpolation | None:
        """That of the process."""
        return self.process.find_noise(num_tokens)

    def check(self, data: DataConfig, finetuning: FinetuningConfig) -> None:
        """Refuses windows that never come back, and what responses have no use for."""
        if self.noise == "repeated" and not data.repeats_windows:
            raise ValueError(
                "objective.noise=repeated belongs to windows that come back, and those of "
                f"data.order={data.order} do not: use data.order=shuffle or fixed."
            )
        if finetuning.enabled:
            names = ("stochastic_length_ratio", "left_to_right_ratio")
            fields = {f"objective.{name}": (getattr(self, name), 0.0) for name in names}
            refuse_with_responses(self.kind, fields)

    def check_num_steps(self, num_steps: int) -> None:
        """Refuses a run that ends before attention is full."""
        if self.attention_annealing_steps >= num_steps:
            raise ConfigError(
                f"objective.attention_annealing_steps={self.attention_annealing_steps} leaves none "
                f"of the run's {num_steps} steps to full attention, in which the model is used: "
                f"use at most {num_steps - 1}."
            )

    def build(self, run: RunFacts) -> Objective:
        """Makes the objective; of responses where these alone are learned."""
        noise, steps = CounterNoise(run.seed), self.attention_annealing_steps
        spread = self.time_sampling == "low_discrepancy"
        times = TimeSampler(noise, run.global_batch_size, spread)
        process = build_component(self.process, "objective.process", ForwardProcess, run)
        attention = WideningAttention(steps) if steps else FULL_ATTENTION
        repeats = self.noise == "repeated"
        if run.finetuning.enabled:
            return ResponseDiffusionObjective(
                noise=noise,
                times=times,
                process=process,
                mask_token_id=run.mask_token_id,
                prompt_dropout=run.finetuning.prompt_dropout,
                attention=attention,
                repeats_noise=repeats,
            )
        return MaskedDiffusionObjective(
            noise=noise,
            times=times,
            process=process,
            mask_token_id=run.mask_token_id,
            lengths=LengthSampler(noise, self.stochastic_length_ratio),
            left_to_right=LeftToRight(noise, self.left_to_right_ratio),
            attention=attention,
            repeats_noise=repeats,
        )


@dataclass(frozen=True)
class MaskedDiffusionObjective(Objective):
    """Restore corrupted tokens, at every rate from none to all.

    Attributes:
        noise: Source of draws.
        times: Time of every position.
        process: What corrupts tokens.
        mask_token_id: Input id that hides a token.
        lengths: Length of every position.
        left_to_right: Hides the last tokens of some samples instead, as many.
        attention: Full, at least at the end.
        repeats_noise: Are the draws those of the window, not of the visit?
    """

    noise: CounterNoise
    times: Callable[[int], float]
    process: ForwardProcess
    mask_token_id: int
    lengths: LengthSampler
    left_to_right: LeftToRight
    attention: FullAttention = FULL_ATTENTION
    repeats_noise: bool = False

    has_noise: ClassVar[bool] = True
    loss_kinds: ClassVar[tuple[LossKind, ...]] = ("nll", "nll_given_first")

    @property
    def uses_mask_token(self) -> bool:
        """As the process does."""
        return self.process.uses_mask_token

    def sample(self, window: TextWindow, position: int) -> Sample:
        """Corrupts a window.

        Args:
            window: Clean tokens; their documents have no effect on the corruption.
            position: Place in the global order, from 0.

        Returns:
            The sample; the target of a position is the token itself, without a shift.

        Raises:
            DataError: The window holds the mask token, which nothing can predict.

        Source:
            arXiv 2410.18514, equation 3, divided by the number of tokens.
        """
        if self.uses_mask_token:
            refuse_mask_token(window.tokens_S, self.mask_token_id, position)
        length = self.lengths(len(window.tokens_S), position)
        x0_L, size = window.tokens_S[:length], length * self.process.uniforms_per_token
        uniforms_N = self.noise.uniforms(Purpose.MASK, position, size)
        corruption = self.process.corrupt(x0_L, self.times(position), uniforms_N)
        return corrupted_sample(window, self.left_to_right(corruption, x0_L, position))

    def held_out_sample(self, window: TextWindow, kind: LossKind, draw: HeldOutDraw) -> Sample:
        """Corrupts a window as the process does where it is judged.

        Args:
            window: Clean tokens, and perhaps their documents.
            kind: `nll_given_first` never corrupts the first token of a document.
            draw: Noise of the sample.

        Returns:
            The sample; weights are 0 where nothing can be corrupted.
        """
        x0_S = window.tokens_S
        places = np.arange(len(x0_S)) if kind == "nll" else find_places_after_first(window)
        inputs_S, weights_S = x0_S.copy(), np.zeros(len(x0_S))
        # Where nothing can be corrupted, a token that is left as it is says what the model is told.
        corrupted = places if len(places) else np.arange(1)
        uniforms_N = draw.uniforms(len(corrupted) * self.process.uniforms_per_token)
        found = self.process.corrupt_held_out(x0_S[corrupted], draw.time, uniforms_N)
        told = {**list_segments(window), **found.model_inputs}
        if not len(places):
            return Sample(inputs_S, x0_S, weights_S.astype(np.float32), len(x0_S), told)
        inputs_S[places] = found.xt_L
        weights_S[places] = found.weights_L / len(places)
        loss_inputs = spread_loss_inputs([(found, places)], len(x0_S))
        return Sample(inputs_S, x0_S, weights_S.astype(np.float32), len(x0_S), told, loss_inputs)

    def count_predictions(self, window: TextWindow) -> int:
        """All tokens."""
        return len(window.tokens_S)

    def mean_length(self, seq_length: int) -> float:
        """That of `lengths`."""
        return self.lengths.mean(seq_length)

    def predicted_share(self, seq_length: int, learned_share: float = 1.0) -> float:
        """Expected share of a window's positions that are predicted; all tokens are learned."""
        del learned_share
        return self.process.mean_count(self.mean_length(seq_length)) / seq_length
