"""What generation asks of a model, wherever its weights come from, and a batch of it.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megatron_mdm.diffusion.decoding import Decoding
from megatron_mdm.diffusion.samplers import StepCallback


@dataclass(frozen=True)
class ModelFacts:
    """What requests have to fit.

    Attributes:
        name: What to call the model.
        is_causal: An autoregressive model: it continues a prompt and fills no masks.
        vocab_size: Real tokens, V.
        mask_token_id: Id of the mask token.
        max_length: Longest sequence that training saw, in tokens.
        end_token_id: Id that ends a text, if any.
        stops_at_end: Does that token end a text unless told otherwise?
        aligns_prompts: Can an autoregressive batch hold prompts of different lengths?
        has_cache: Can the model keep keys and values between passes?
        decoding: Options where none are given.
    """

    name: str
    is_causal: bool
    vocab_size: int
    mask_token_id: int
    max_length: int
    end_token_id: int | None
    stops_at_end: bool
    aligns_prompts: bool
    has_cache: bool
    decoding: Decoding


@dataclass(frozen=True)
class Batch:
    """Sequences that share their forward passes. Tensors lie on the CPU.

    Attributes:
        tokens_BS: int64 [B, S]. Masked diffusion: whole sequences with mask tokens where new ones
            go, padded on the right. Autoregressive: prompts, padded on the left.
        is_real_BS: Bool [B, S], False at padding.
        hidden_BS: int64 [B, S], what the other pass of guidance sees; None without guidance.
        num_new_tokens: New tokens; the most of any sequence.
        seeds: One for each sequence.
        decoding: Options of the sampler.
        cache: Keep keys and values between passes; None: as the model does.
        cache_refresh_steps: Compute them all again every so many steps; None: as the model does.
    """

    tokens_BS: Tensor
    is_real_BS: Tensor
    hidden_BS: Tensor | None
    num_new_tokens: int
    seeds: list[int]
    decoding: Decoding
    cache: bool | None = None
    cache_refresh_steps: int | None = None


class TextModel(Protocol):
    """A model with its tokenizer."""

    facts: ModelFacts
    tokenizer: Any

    def complete(self, batch: Batch, callback: StepCallback | None = None) -> Tensor:
        """Fills the masks of a batch, or continues its prompts.

        Args:
            batch: What, and how.
            callback: Called after every step.

        Returns:
            int64 on the CPU: [B, S], or [B, S + n] with n <= `num_new_tokens`.

        Raises:
            ConfigError: An option does not fit the model.
        """
        ...

    def lead(self, work: Callable[[], None]) -> None:
        """Does work that calls `complete` on one rank, while all others serve it.

        Args:
            work: What to do.
        """
        ...
