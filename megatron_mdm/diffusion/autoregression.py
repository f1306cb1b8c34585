"""Next-token prediction over whole windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from megatron_mdm.config.data import DataConfig
from megatron_mdm.config.finetuning import FinetuningConfig
from megatron_mdm.config.objective import ObjectiveConfig, RunFacts, refuse_with_responses
from megatron_mdm.config.section import PositiveInt
from megatron_mdm.diffusion.attention_rules import CAUSAL_ATTENTION, FullAttention
from megatron_mdm.diffusion.lengths import LengthSampler, Ratio
from megatron_mdm.diffusion.noise import CounterNoise
from megatron_mdm.diffusion.reading_orders import ReadingOrders, reorder, tell_order
from megatron_mdm.diffusion.responses import ResponsePredictionObjective
from megatron_mdm.diffusion.samples import (
    HeldOutDraw,
    LossKind,
    Objective,
    Sample,
    TextWindow,
    find_places_after_first,
    next_token_sample,
)

if TYPE_CHECKING:
    from megatron_mdm.diffusion.key_dropout import KeyDropout


class AutoregressionConfig(ObjectiveConfig):
    """Next-token prediction, the baseline."""

    kind: str = Field(default="ar", description="Next-token prediction.")
    stochastic_length_ratio: Ratio = Field(
        default=0.0, description="Share of samples cut to a length drawn from U{2..seq_length}."
    )
    num_orders: PositiveInt = Field(
        default=1,
        description="Orders in which windows are read: the text's own and so many fixed "
        "permutations less one; every sample draws one (an ablation).",
    )
    key_dropout: bool = Field(
        default=False,
        description="Each query loses each earlier token with a chance drawn from U(0.001, 1) "
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

    trains: ClassVar[str] = "an autoregressive language model"
    learns_responses: ClassVar[bool] = True
    # One file serves a pair of runs that differ in their kind alone.
    ignored: ClassVar[frozenset[str]] = frozenset(
        ("process", "time_sampling", "noise", "left_to_right_ratio")
    )

    @property
    def nll_is_exact(self) -> bool:
        """It is."""
        return True

    @property
    def runs_as(self) -> Literal["mdm", "ar"] | None:
        """Next token."""
        return "ar"

    @model_validator(mode="after")
    def _check_orders(self) -> Self:
        if self.num_orders > 1 and self.stochastic_length_ratio > 0:
            raise ValueError(
                f"objective.num_orders={self.num_orders} permutes whole windows, and "
                f"objective.stochastic_length_ratio={self.stochastic_length_ratio} cuts some: set "
                "one of them to its default."
            )
        return self

    @model_validator(mode="after")
    def _check_key_dropout(self) -> Self:
        for name in ("key_dropout_rate_per", "key_dropout_ratio"):
            value = getattr(self, name)
            if not self.key_dropout and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"objective.{name}={value} says how keys are dropped, and none are: set "
                    f"objective.key_dropout=true, or leave {name} out."
                )
        return self

    def check(self, data: DataConfig, finetuning: FinetuningConfig) -> None:
        """Refuses orders that break documents, and what responses have no use for."""
        if self.num_orders > 1 and data.attention == "document":
            raise ValueError(
                f"objective.num_orders={self.num_orders} scatters the tokens of a document, which "
                "data.attention=document takes for neighbours: use data.attention=window."
            )
        if not finetuning.enabled:
            return
        names = ("stochastic_length_ratio", "num_orders", "key_dropout")
        defaults = {name: type(self).model_fields[name].default for name in names}
        refuse_with_responses(
            self.kind,
            {f"objective.{name}": (getattr(self, name), defaults[name]) for name in names}
            | {
                "finetuning.prompt_dropout": (finetuning.prompt_dropout, 0.0),
                "finetuning.fill_to": (finetuning.fill_to or 0, 0),
            },
        )

    def build(self, run: RunFacts) -> Objective:
        """Makes the objective; of responses where these alone are learned."""
        if run.finetuning.enabled:
            return ResponsePredictionObjective()
        noise, orders, key_dropout = CounterNoise(run.seed), None, None
        if self.num_orders > 1:
            orders = ReadingOrders(noise, run.seed, self.num_orders)
        if self.key_dropout:
            # It computes with torch, which other runs' configurations do without.
            from megatron_mdm.diffusion.key_dropout import KeyDropout

            key_dropout = KeyDropout(noise, self.key_dropout_rate_per, self.key_dropout_ratio)
        lengths = LengthSampler(noise, self.stochastic_length_ratio, minimum=2)
        return AutoregressiveObjective(lengths, orders, key_dropout)


@dataclass(frozen=True)
class AutoregressiveObjective(Objective):
    """Predict the next token of the document: a window's predictions, averaged over those.

    Attributes:
        lengths: Length of every position, at least 2.
        orders: Orders in which windows are read; None: the text's own alone.
        key_dropout: Draws the keys that queries lose; None: they lose none.

    Source:
        arXiv 2507.15857, ablations.
    """

    lengths: LengthSampler
    orders: ReadingOrders | None = None
    key_dropout: KeyDropout | None = None

    def sample(self, window: TextWindow, position: int) -> Sample:
        """Pairs every token with its successor.

        Args:
            window: Clean tokens, at least 2, and perhaps their documents.
            position: Place in the global order, from 0.

        Returns:
            The sample; the last token has no target, nor has the last of a document.
        """
        length = self.lengths(len(window.tokens_S), position)
        if self.orders is None:
            sample = next_token_sample(window, length)
        else:
            order_S = self.orders.choose(len(window.tokens_S), position)
            sample = tell_order(next_token_sample(reorder(window, order_S), length), order_S)
        if self.key_dropout is None:
            return sample
        lost = self.key_dropout.draw_inputs(position)
        return sample._replace(model_inputs={**sample.model_inputs, **lost})

    def held_out_sample(self, window: TextWindow, kind: LossKind, draw: HeldOutDraw) -> Sample:
        """The window in its own order, with all keys."""
        del kind, draw
        return next_token_sample(window, len(window.tokens_S))

    def count_predictions(self, window: TextWindow) -> int:
        """All tokens but the first of each document."""
        return len(find_places_after_first(window))

    @property
    def attention(self) -> FullAttention:
        """Causal, perhaps without some keys."""
        return CAUSAL_ATTENTION if self.key_dropout is None else self.key_dropout.attention

    def mean_length(self, seq_length: int) -> float:
        """That of `lengths`."""
        return self.lengths.mean(seq_length)

    def predicted_share(self, seq_length: int, learned_share: float = 1.0) -> float:
        """All tokens of a sample but one, over those of a window."""
        del learned_share
        return (self.mean_length(seq_length) - 1) / seq_length
