"""Next-token prediction over whole windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_mdm.diffusion.attention_rules import CausalAttention, FullAttention
from megatron_mdm.diffusion.key_dropout import CausalWithDroppedKeys, KeyDropout
from megatron_mdm.diffusion.lengths import LengthSampler
from megatron_mdm.diffusion.reading_orders import ReadingOrders, reorder, tell_order
from megatron_mdm.diffusion.samples import (
    HeldOutDraw,
    LossKind,
    Sample,
    TextWindow,
    next_token_sample,
    places_after_first,
)


@dataclass(frozen=True)
class AutoregressiveObjective:
    """Predict the next token of the document: a window's predictions, averaged over those.

    Attributes:
        lengths: Length of every position, at least 2.
        orders: In which windows may be read; None: the text's own alone.
        key_dropout: Draws the keys that queries lose; None: they lose none.

    Source:
        arXiv 2507.15857, ablations.
    """

    lengths: LengthSampler
    orders: ReadingOrders | None = None
    key_dropout: KeyDropout | None = None

    has_noise: ClassVar[bool] = False
    uses_mask_token: ClassVar[bool] = False
    loss_kinds: ClassVar[tuple[LossKind, ...]] = ("nll",)

    def __call__(self, window: TextWindow, position: int) -> Sample:
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
        lost = self.key_dropout.model_inputs(position)
        return sample._replace(model_inputs={**sample.model_inputs, **lost})

    def held_out_sample(self, window: TextWindow, kind: LossKind, draw: HeldOutDraw) -> Sample:
        """The window in its own order, with all keys."""
        del kind, draw
        return next_token_sample(window, len(window.tokens_S))

    def count_predictions(self, window: TextWindow) -> int:
        """All tokens but the first of each document."""
        return len(places_after_first(window))

    @property
    def attention(self) -> FullAttention:
        """Causal, perhaps without some keys."""
        return CausalAttention() if self.key_dropout is None else CausalWithDroppedKeys()

    def mean_length(self, seq_length: int) -> float:
        """That of `lengths`."""
        return self.lengths.mean(seq_length)

    def predicted_share(self, seq_length: int, learned_share: float = 1.0) -> float:
        """All tokens of a sample but one, over those of a window."""
        del learned_share
        return (self.mean_length(seq_length) - 1) / seq_length
