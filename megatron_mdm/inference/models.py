"""What inference asks of a model, wherever its weights come from.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_mdm.diffusion.decoding import Decoding
from megatron_mdm.diffusion.interpolation import Interpolation
from megatron_mdm.diffusion.samplers import StepCallback
from megatron_mdm.inference.passes import Judgement, Passes


@dataclass(frozen=True)
class ModelFacts:
    """Properties of a model that requests have to fit.

    Attributes:
        name: What to call the model.
        is_causal: An autoregressive model: it continues a prompt and unmasks nothing.
        vocab_size: Real tokens, V.
        mask_token_id: Id of the mask token.
        max_length: Longest sequence that training saw, in tokens.
        end_token_id: Id that ends a text, if any.
        decoding: Options of generation where none are given.
        aligns_prompts: Can an autoregressive batch hold prompts of different lengths?
        has_cache: Can the model keep keys and values between passes?
        noise: Of its training, where it is not masks alone.
        takes_log_snr: Has to be told the log-SNR of the noise besides the tokens.
        is_shifted: In masked diffusion, does the hidden state before a mask predict the token
            there? A text then has to begin with a token that is given.
        sees_prompt: An autoregressive model whose prompt's tokens see each other, all of them.
        corpus_nats: Of a token of the corpus, by the counts of single tokens; None: not known.
    """

    name: str
    is_causal: bool
    vocab_size: int
    mask_token_id: int
    max_length: int
    end_token_id: int | None
    decoding: Decoding = field(default_factory=Decoding)
    aligns_prompts: bool = True
    has_cache: bool = True
    noise: Interpolation | None = None
    takes_log_snr: bool = False
    is_shifted: bool = False
    sees_prompt: bool = False
    corpus_nats: float | None = None


@dataclass(frozen=True)
class SamplingBatch:
    """Sequences that are generated together. Tensors lie on the CPU.

    Attributes:
        tokens_BS: int64 [B, S]. Masked diffusion: whole sequences with mask tokens where new ones
            go, padded on the right. Autoregressive: prompts, padded on the left.
        is_real_BS: Bool [B, S], False at padding.
        guidance_BS: int64 [B, S], what the other pass of guidance sees; None without guidance.
        seeds: One for each sequence.
        decoding: Options; `max_new_tokens` is the most of any sequence.
    """

    tokens_BS: Tensor
    is_real_BS: Tensor
    guidance_BS: Tensor | None
    seeds: list[int]
    decoding: Decoding


class TextModel(Protocol):
    """A model that generates, with its tokenizer."""

    facts: ModelFacts
    tokenizer: Any

    def complete(self, batch: SamplingBatch, callback: StepCallback | None = None) -> Tensor:
        """Unmasks the mask tokens of a batch, or continues its prompts.

        Args:
            batch: What, and how.
            callback: Called after every step.

        Returns:
            int64 on the CPU: [B, S], or [B, S + n] with n <= `max_new_tokens`.

        Raises:
            ConfigError: An option does not fit the model.
        """
        ...

    def run_on_driver(self, work: Callable[[], None]) -> None:
        """Does work that calls `complete` on the driver, while the workers serve it."""
        ...


class ScoringModel(Protocol):
    """A model that can be asked about tokens."""

    facts: ModelFacts
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def judge(self, passes: Passes) -> Judgement:
        """Says how likely the targets are, by forward passes that it makes at once."""
        ...
