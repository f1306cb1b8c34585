"""Next-token prediction and masked diffusion in one network: each sample is of one of them.

Of which is a function of the seed and the sample's place. Whole groups of neighbouring samples are
of one kind, so that no micro batch is mixed: each computes one loss, with the kernel of its own
attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from megatron_mdm.config.component import build_component
from megatron_mdm.config.objective import ObjectiveConfig, ObjectiveKind, RunFacts, RunWays
from megatron_mdm.config.section import PositiveInt
from megatron_mdm.diffusion.attention_rules import FullAttention
from megatron_mdm.diffusion.autoregression import AutoregressiveObjective
from megatron_mdm.diffusion.forward_process import (
    CHOSEN_PROCESS,
    ForwardProcess,
    ForwardProcessConfig,
)
from megatron_mdm.diffusion.kind_order import DiffusionTimes, KindOrder
from megatron_mdm.diffusion.left_to_right import LeftToRight
from megatron_mdm.diffusion.lengths import LengthSampler, Ratio
from megatron_mdm.diffusion.masked_diffusion import MaskedDiffusionObjective
from megatron_mdm.diffusion.noise import CounterNoise, IntArray, TimeSampler
from megatron_mdm.diffusion.samples import (
    HeldOutDraw,
    LossKind,
    Objective,
    Sample,
    TextWindow,
    find_places_after_first,
    shift_tokens,
)

# From this share on a run is judged as AR where nothing else is said.
_MOSTLY_AR = 0.5


class MixtureConfig(ObjectiveConfig):
    """Next-token prediction and masked diffusion in one network, sample by sample.

    Source:
        arXiv 2512.14549.
    """

    kind: str = Field(default="mixture", description="Next-token prediction and masked diffusion.")
    ar_share: Ratio = Field(
        default=0.5,
        description="Share of samples that are learned by next-token prediction, alpha in "
        "alpha L_AR + (1 - alpha) L_MD; the others by masked diffusion.",
    )
    group_size: PositiveInt | None = Field(
        default=None,
        description="Neighbouring samples that are learned alike, a multiple of "
        "batch.micro_batch_size that divides batch.global_batch_size; none: one micro batch. "
        "Name it where the run is to be the same with other micro batches.",
    )
    shift: bool = Field(
        default=True,
        description="true: in masked diffusion too, the hidden state before a mask predicts the "
        "token there (the paper's), and the first token of a text is not predicted; false: the one "
        "at the mask does, as in kind=mdm.",
    )
    own_loss: Literal["ar", "mdm"] | None = Field(
        default=None,
        description="The held-out loss that is the run's own, and how its exports run unless told "
        "otherwise; none: ar from ar_share=0.5 on, mdm below. Both are logged.",
    )
    process: Annotated[ForwardProcessConfig, CHOSEN_PROCESS] = Field(
        default_factory=CHOSEN_PROCESS.read_default,
        description="What corrupts tokens of masked diffusion; it has to mask alone.",
    )
    time_sampling: Literal["low_discrepancy", "iid"] = Field(
        default="low_discrepancy",
        description="t stratified over the masked-diffusion samples of the global batch, or "
        "independent for each.",
    )
    stochastic_length_ratio: Ratio = Field(
        default=0.0,
        description="Share of samples cut to a length drawn from U{1..seq_length}, those of "
        "next-token prediction from U{2..seq_length}.",
    )

    trains: ClassVar[str] = "a mixture of an autoregressive and a masked-diffusion language model"

    @model_validator(mode="after")
    def _check_process(self) -> Self:
        if not self.process.hides_tokens:
            raise ValueError(
                f"objective.process.kind={self.process.kind} does not mask alone, and "
                "objective.kind=mixture has one loss for both of its sides, the cross-entropy: use "
                "objective.process.kind=absorbing, or objective.kind=mdm."
            )
        return self

    @model_validator(mode="after")
    def _check_own_loss(self) -> Self:
        never = {0.0: "ar", 1.0: "mdm"}.get(self.ar_share)
        if self.own_loss is not None and self.own_loss == never:
            raise ValueError(
                f"objective.own_loss={self.own_loss} is of what objective.ar_share="
                f"{self.ar_share:g} never learns: leave it out."
            )
        return self

    @property
    def runs_as(self) -> ObjectiveKind:
        """As `own_loss` says."""
        return self.own_loss or ("ar" if self.ar_share >= _MOSTLY_AR else "mdm")

    @property
    def run_ways(self) -> RunWays:
        """All that was learned; a prefix needs both."""
        if self.ar_share in (0.0, 1.0):
            return RunWays((self.runs_as,), self.shift and self.runs_as == "mdm")
        own = self.runs_as
        return RunWays((own, "mdm" if own == "ar" else "ar", "prefix"), self.shift)

    @property
    def nll_is_exact(self) -> bool:
        """Where it is that of next-token prediction."""
        return self.runs_as == "ar"

    @property
    def remark(self) -> str | None:
        """That of the process."""
        return self.process.remark

    def complete(self, micro_batch_size: int) -> Self:
        """Decides the size of a group."""
        return self.model_copy(update={"group_size": self.group_size or micro_batch_size})

    def check_batch(self, micro_batch_size: int, global_batch_size: int) -> None:
        """Refuses groups that cut a micro batch or a step in two."""
        size = self.group_size or micro_batch_size
        if global_batch_size % micro_batch_size:
            # Said with the sizes that would do where the ranks are known.
            return
        if size % micro_batch_size or global_batch_size % size:
            raise ValueError(
                f"objective.group_size={size} has to be a multiple of batch.micro_batch_size="
                f"{micro_batch_size}, whose samples are computed together, and to divide "
                f"batch.global_batch_size={global_batch_size}: leave it out, which takes "
                f"{micro_batch_size}."
            )

    def build(self, run: RunFacts) -> Objective:
        """Makes the objective."""
        noise, ratio = CounterNoise(run.seed), self.stochastic_length_ratio
        size = self.group_size or 1
        kinds = KindOrder(noise, Fraction(str(self.ar_share)), size, run.global_batch_size // size)
        spread = self.time_sampling == "low_discrepancy"
        side = ShiftedDiffusionObjective if self.shift else MaskedDiffusionObjective
        diffusion = side(
            noise=noise,
            times=DiffusionTimes(kinds, TimeSampler(noise, run.global_batch_size, spread)),
            process=build_component(self.process, "objective.process", ForwardProcess, run),
            mask_token_id=run.mask_token_id,
            lengths=LengthSampler(noise, ratio),
            left_to_right=LeftToRight(noise, 0.0),
        )
        prediction = AutoregressiveObjective(LengthSampler(noise, ratio, minimum=2))
        judges = tuple(way for way in self.run_ways.ways if way != "prefix")
        return MixedObjective(kinds, prediction, diffusion, judges)


def describe_ways(run_ways: RunWays) -> dict[str, Any]:
    """A section of a model of which nothing is known but how it runs.

    Args:
        run_ways: How.

    Returns:
        Fields by which `MixtureConfig.run_ways` are these; its share of samples stands for any.
    """
    own = run_ways.ways[0]
    share = 0.5 if len(run_ways.ways) > 1 else float(own == "ar")
    return {"kind": "mixture", "ar_share": share, "own_loss": own, "shift": run_ways.is_shifted}


@dataclass(frozen=True)
class ShiftedDiffusionObjective(MaskedDiffusionObjective):
    """Masked next-token prediction: the hidden state before a mask predicts the token there.

    Tokens are hidden as in masked diffusion. The first token of a text has nothing before it, so it
    is never predicted though it may be hidden, and the mean is over the others, which are those of
    next-token prediction.

    Source:
        arXiv 2512.14549.
    """

    # All that is predicted is what AR predicts.
    loss_kinds: ClassVar[tuple[LossKind, ...]] = ("nll",)

    def sample(self, window: TextWindow, position: int) -> Sample:
        """As for masked diffusion, with each prediction one place earlier."""
        sample = super().sample(window, position)
        predicted = find_places_after_first(window)
        predicted = predicted[predicted < sample.length]
        return _predict_one_before(sample, predicted, sample.length / max(len(predicted), 1))

    def held_out_sample(self, window: TextWindow, kind: LossKind, draw: HeldOutDraw) -> Sample:
        """The bound over all tokens but the first of each text, which is given."""
        del kind
        sample = super().held_out_sample(window, "nll_given_first", draw)
        return _predict_one_before(sample, find_places_after_first(window), 1.0)

    def count_predictions(self, window: TextWindow) -> int:
        """All tokens but the first of each text."""
        return len(find_places_after_first(window))

    def predicted_share(self, seq_length: int, learned_share: float = 1.0) -> float:
        """That of masked diffusion, without the first token."""
        share = super().predicted_share(seq_length, learned_share)
        return share * (1.0 - 1.0 / self.mean_length(seq_length))


def _predict_one_before(sample: Sample, predicted_N: IntArray, factor: float) -> Sample:
    """Moves predictions of some places one to the left, and scales their weights."""
    weights_S = np.zeros_like(sample.weights_S)
    weights_S[predicted_N - 1] = sample.weights_S[predicted_N] * factor
    return sample._replace(targets_S=shift_tokens(sample.targets_S), weights_S=weights_S)


@dataclass(frozen=True)
class MixedObjective(Objective):
    """Some samples are of next-token prediction, the others of masked diffusion.

    So the loss of a step is alpha L_AR + (1 - alpha) L_MD, in expectation.

    Attributes:
        kinds: Which samples are which.
        prediction: Next-token prediction.
        diffusion: Masked diffusion, shifted or not.
        own: Names of those that held-out windows are judged by, `ar` and `mdm`; the first gives the
            run's own loss.
    """

    kinds: KindOrder
    prediction: Objective
    diffusion: Objective
    own: tuple[str, ...]

    has_noise: ClassVar[bool] = True

    @property
    def judges(self) -> Mapping[str, Objective]:
        """Those that the run learns."""
        sides = {"ar": self.prediction, "mdm": self.diffusion}
        return {name: sides[name] for name in self.own}

    @property
    def attention(self) -> FullAttention:
        """That of the run's own loss, where a batch says nothing."""
        return next(iter(self.judges.values())).attention

    @property
    def causal_share(self) -> float:
        """The share of next-token prediction."""
        return float(self.kinds.ar_share)

    @property
    def uses_mask_token(self) -> bool:
        """Where anything is hidden."""
        return self.kinds.ar_share < 1 and self.diffusion.uses_mask_token

    def sample(self, window: TextWindow, position: int) -> Sample:
        """As the sample's kind makes it.

        Args:
            window: Clean tokens, and perhaps their documents.
            position: Place in the global order, from 0.

        Returns:
            The sample, which says itself how it attends.

        Raises:
            DataError: As the kind says.
        """
        side = self.prediction if self.kinds.find(position).is_ar else self.diffusion
        return side.sample(window, position)._replace(attention=side.attention)

    def held_out_sample(self, window: TextWindow, kind: LossKind, draw: HeldOutDraw) -> Sample:
        """That of the run's own loss."""
        judge = next(iter(self.judges.values()))
        sample = judge.held_out_sample(window, kind, draw)
        return sample._replace(attention=judge.attention)

    def count_predictions(self, window: TextWindow) -> int:
        """Those of the run's own loss."""
        return next(iter(self.judges.values())).count_predictions(window)

    def predicted_share(self, seq_length: int, learned_share: float = 1.0) -> float:
        """The mean over both kinds."""
        return self._mean(
            self.prediction.predicted_share(seq_length, learned_share),
            self.diffusion.predicted_share(seq_length, learned_share),
        )

    def mean_length(self, seq_length: int) -> float:
        """The mean over both kinds."""
        lengths = (side.mean_length(seq_length) for side in (self.prediction, self.diffusion))
        return self._mean(*lengths)

    def _mean(self, of_prediction: float, of_diffusion: float) -> float:
        share = float(self.kinds.ar_share)
        return share * of_prediction + (1.0 - share) * of_diffusion
