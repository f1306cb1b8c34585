"""What a run learns: the `objective` section."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_mdm.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class ObjectiveConfig(Section):
    """What is learned: masked diffusion or next-token prediction."""

    kind: Literal["mdm", "ar"] = Field(default="mdm", description="Masked diffusion or AR.")
    masking: Literal["bernoulli", "fixed_count"] = Field(
        default="bernoulli",
        description="bernoulli: every token masked with probability p (the papers'); "
        "fixed_count: exactly l ~ U{1..L} tokens masked, same expectation, lower variance.",
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
    left_to_right_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="Share of an MDM's samples whose last tokens are masked instead of as many "
        "random ones (an ablation).",
    )
    num_orders: PositiveInt = Field(
        default=1,
        description="Orders in which AR reads windows: the text's own and so many fixed "
        "permutations less one; every sample draws one (an ablation).",
    )
    key_dropout: bool = Field(
        default=False,
        description="AR: each query loses each earlier token with a chance drawn from U(0.001, 1) "
        "(an ablation).",
    )
    key_dropout_rate_per: Literal["query", "sample"] = Field(
        default="query",
        description="What draws that chance. query: each token that attends, its own (the "
        "paper's); sample: each sample, one for all its tokens.",
    )
    key_dropout_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="Share of what draws a chance, so of the queries or of the samples, that "
        "loses keys; the rest loses none.",
    )
    stochastic_length_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="Share of samples cut to a length drawn from U{1..seq_length} (AR: from 2).",
    )
    attention_annealing_steps: NonNegativeInt = Field(
        default=0,
        description="Optimizer steps in which attention widens from causal to full, for an MDM "
        "that begins with the weights of a causal model; 0: full from the start.",
    )

    @model_validator(mode="after")
    def _times_are_a_range(self) -> Self:
        if self.t_min >= self.t_max:
            raise ValueError(
                f"objective.t_min={self.t_min} is not below objective.t_max={self.t_max}: give a "
                "range of times."
            )
        return self

    @model_validator(mode="after")
    def _orders_are_for_ar(self) -> Self:
        given = f"objective.num_orders={self.num_orders}" if self.num_orders > 1 else ""
        if self.key_dropout and not given:
            given = "objective.key_dropout=true"
        if given and self.kind == "mdm":
            raise ValueError(
                f"{given} is an ablation of AR and objective.kind is mdm: leave it out, or set "
                "objective.kind=ar."
            )
        if self.num_orders > 1 and self.stochastic_length_ratio > 0:
            raise ValueError(
                f"objective.num_orders={self.num_orders} permutes whole windows, and "
                f"objective.stochastic_length_ratio={self.stochastic_length_ratio} cuts some: set "
                "one of them to its default."
            )
        return self

    @model_validator(mode="after")
    def _key_dropout_is_on(self) -> Self:
        for name in ("key_dropout_rate_per", "key_dropout_ratio"):
            value = getattr(self, name)
            if not self.key_dropout and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"objective.{name}={value} says how keys are dropped, and none are: set "
                    f"objective.key_dropout=true, or leave {name} out."
                )
        return self

    @model_validator(mode="after")
    def _annealing_is_for_diffusion(self) -> Self:
        if self.attention_annealing_steps and self.kind == "ar":
            raise ValueError(
                f"objective.attention_annealing_steps={self.attention_annealing_steps} ends in "
                "full attention, which objective.kind=ar never has: leave it out."
            )
        return self
