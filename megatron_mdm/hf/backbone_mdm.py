"""The transformer under the output layer: embedding, blocks and final norm.

The file travels with every export and imports nothing but its neighbours there.

Shapes: B batch, S sequence, W columns of one pass (S without a cache), H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_mdm import AttentionInputs, MdmAttention, find_visible_keys, pick, rotary_angles
from .configuration_mdm import MdmConfig
from .interpolation import NUM_TIME_FEATURES
from .time_features import compute_time_features


class MdmMlp(nn.Module):
    """SwiGLU, down(silu(gate(x)) * up(x)), or without a gate down(relu(up(x))^2)."""

    def __init__(self, config: MdmConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias) if config.mlp == "swiglu" else None
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        """Maps [B, S, H] to [B, S, H]."""
        inner_BSF = self.up_proj(hidden_BSH)
        if self.gate_proj is None:
            return self.down_proj(F.relu(inner_BSF).square())
        return self.down_proj(F.silu(self.gate_proj(hidden_BSH)) * inner_BSF)


class MdmTimeEmbedding(nn.Linear):
    """A linear map of the features of a log-SNR."""

    def __init__(self, config: MdmConfig) -> None:
        super().__init__(NUM_TIME_FEATURES, config.hidden_size, bias=False)

    def forward(self, log_snr_B: Tensor) -> Tensor:
        """Maps [B] to [B, H]."""
        return super().forward(compute_time_features(log_snr_B).to(self.weight.dtype))


class MdmLayer(nn.Module):
    """One pre-norm block."""

    def __init__(self, config: MdmConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = MdmAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MdmMlp(config)

    def forward(self, hidden_BWH: Tensor, inputs: AttentionInputs) -> Tensor:
        """Maps [B, W, H] to [B, W, H], or to the picked columns [B, Q, H]."""
        mixed = self.self_attn(self.input_layernorm(hidden_BWH), inputs)
        picked_BQ = inputs.picked_BQ
        hidden = hidden_BWH if picked_BQ is None else pick(hidden_BWH, picked_BQ)
        hidden = hidden + mixed
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class PassRecord(NamedTuple):
    """Intermediate results of a forward pass that the caller asked for.

    Attributes:
        hidden: Takes the embeddings [B, W, H], the output of every block but the last, and the
            normed output; None: they are not kept.
        weights: Takes the attention weights [B, N, W, K] of every block; None: they are not
            computed.
    """

    hidden: list[Tensor] | None = None
    weights: list[Tensor] | None = None

    def to_outputs(self) -> tuple[tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """Converts hidden states and attention weights to the tuples of transformers' outputs."""
        hidden = None if self.hidden is None else tuple(self.hidden)
        return hidden, None if self.weights is None else tuple(self.weights)


NO_RECORD = PassRecord()


class PassWindow(Protocol):
    """A cache as one forward pass sees and changes it, such as `caching_mdm.CacheWindow`."""

    @property
    def start(self) -> int:
        """First column that the pass computes."""

    @property
    def num_keys(self) -> int:
        """Columns K, counted from 0, that the pass may see."""

    def store(self, layer: int, keys_BGWD: Tensor, values_BGWD: Tensor, /) -> tuple[Tensor, Tensor]:
        """Takes the window's keys and values of a layer and gives those of all K columns."""


class MdmBackbone(nn.Module):
    """Embedding, blocks and final norm. The embedding has a row for the mask token.

    Attributes:
        takes_key_masks: Masks may say which keys each query sees.
        gradient_checkpointing: In training keep the input of each block alone, and compute the
            block again for its gradient. transformers sets it, and says how.
    """

    takes_key_masks = True
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, config: MdmConfig) -> None:
        super().__init__()
        self.config = config
        num_rows = max(config.padded_vocab_size, config.mask_token_id + 1)
        self.embed_tokens = nn.Embedding(num_rows, config.hidden_size)
        self.time_embedding = MdmTimeEmbedding(config) if config.time_embedding else None
        self.layers = nn.ModuleList(MdmLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        window: PassWindow | None = None,
        picked_BQ: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        record: PassRecord = NO_RECORD,
        log_snr: Tensor | None = None,
    ) -> Tensor:
        """Computes the hidden states of all columns, or of a window of them.

        Args:
            input_ids: Tokens [B, W], of the columns from `window.start` on.
            attention_mask: [B, S] over all columns, 1 real, 0 padding; or [B, W, K], 1 where a
                column of the window sees one of the K columns; None: no padding.
            position_ids: Rotary positions [B or 1, W]; default: the columns.
            window: Holds the keys and values of the other columns, and takes those of these. None:
                there are no other columns.
            picked_BQ: Columns of the window, int64, whose hidden states are wanted: of the others
                the last block computes keys and values alone. None: all.
            inputs_embeds: Embeddings [B, W, H] in place of `input_ids`, of which exactly one is
                given.
            record: Takes intermediate results.
            log_snr: Log-SNR [B] of the noise of each sequence, ln(a / (1 - a)) with a the chance
                that a token is clean, where `config.time_embedding`.

        Returns:
            Normed hidden states [B, W, H], or [B, Q, H].

        Raises:
            ValueError: There are both tokens and embeddings, or neither; or no log-SNR for each
                sequence where it is needed.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        hidden_BWH = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.time_embedding is not None:
            if log_snr is None or log_snr.shape != hidden_BWH.shape[:1]:
                raise ValueError(
                    "This model has an embedding of the noise level: pass log_snr, a tensor with "
                    f"the log-SNR of each of the {len(hidden_BWH)} sequences."
                )
            hidden_BWH = hidden_BWH + self.time_embedding(log_snr.to(hidden_BWH.device))[:, None]
        start = 0 if window is None else window.start
        stop = start + hidden_BWH.shape[1]
        num_keys = stop if window is None else window.num_keys
        device = hidden_BWH.device
        if position_ids is None:
            position_ids = torch.arange(start, stop, device=device)[None]
        rotary = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        mask = find_visible_keys(
            attention_mask, start, stop, num_keys, self.config.is_causal, device
        )
        for index, layer in enumerate(self.layers):
            if record.hidden is not None:
                record.hidden.append(hidden_BWH)
            store = None if window is None else partial(window.store, index)
            is_last = index == len(self.layers) - 1
            picked = picked_BQ if is_last else None
            inputs = AttentionInputs(rotary, mask, store, picked, record.weights)
            if self.gradient_checkpointing and self.training:
                hidden_BWH = self._gradient_checkpointing_func(layer.__call__, hidden_BWH, inputs)
            else:
                hidden_BWH = layer(hidden_BWH, inputs)
        hidden_BWH = self.norm(hidden_BWH)
        if record.hidden is not None:
            record.hidden.append(hidden_BWH)
        return hidden_BWH
