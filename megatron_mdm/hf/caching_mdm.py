"""Keys and values kept between the forward passes of one generation.

The file travels with every export and imports nothing but its neighbours there.

Shapes: B sequences, S columns, W columns of one pass, L layers, G key and value heads, D width of a
head, V vocabulary, T needed positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .sampler_state import Window
from .token_choice import guided_logits


class BlockCache:
    """Keys and values of every layer and column, written window by window.

    For a causal model it is the usual, exact key-value cache: a pass sees the columns up to its
    own. For a bidirectional one a pass sees all columns, those outside its window as they were
    when last computed.

    The first pass takes the memory, on each layer's device: 2 * L * B * G * S * D numbers in the
    model's dtype, with B doubled under guidance. A model of 24 layers, 16 key heads and width 64
    takes 96 KiB per token in bfloat16.

    Args:
        num_rows: Sequences B.
        num_columns: Columns S.
        is_causal: A pass sees no column after its own.
    """

    def __init__(self, num_rows: int, num_columns: int, *, is_causal: bool) -> None:
        self.shape = (num_rows, num_columns)
        self._is_causal = is_causal
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def open_window(self, start: int, stop: int, replaced_BW: Tensor | None = None) -> CacheWindow:
        """Opens the cache for one pass.

        Args:
            start: First column that the pass computes.
            stop: The column after the last one.
            replaced_BW: See `CacheWindow`.

        Returns:
            What the pass needs of the cache.
        """
        num_keys = stop if self._is_causal else self.shape[1]
        return CacheWindow(self, start, num_keys, replaced_BW)

    def get_layer(self, index: int, like_BGWD: Tensor) -> tuple[Tensor, Tensor]:
        """Gives one layer's keys and values.

        Args:
            index: The layer, from 0.
            like_BGWD: Some of its keys, for their sizes, dtype and device.

        Returns:
            The cache's own tensors, each [B, G, S, D]; zeros before the first pass.
        """
        if index not in self._layers:
            num_groups, width = like_BGWD.shape[1], like_BGWD.shape[3]
            shape = (self.shape[0], num_groups, self.shape[1], width)
            self._layers[index] = like_BGWD.new_zeros(shape), like_BGWD.new_zeros(shape)
        return self._layers[index]


class CacheWindow(NamedTuple):
    """The cache as one forward pass sees and changes it.

    Attributes:
        cache: Where the keys and values are.
        start: First column that the pass computes.
        num_keys: Columns K, counted from 0, that the pass may see.
        replaced_BW: Bool, True where what the pass computes takes the place of what the cache
            holds; None: everywhere.
    """

    cache: BlockCache
    start: int
    num_keys: int
    replaced_BW: Tensor | None

    def store(self, layer: int, keys_BGWD: Tensor, values_BGWD: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the window's keys and values of one layer.

        Args:
            layer: The layer, from 0.
            keys_BGWD: Rotated keys of the window.
            values_BGWD: Values of the window.

        Returns:
            Keys and values of all K columns, each [B, G, K, D].
        """
        kept_keys, kept_values = self.cache.get_layer(layer, keys_BGWD)
        stop = self.start + keys_BGWD.shape[2]
        for kept_BGSD, new_BGWD in ((kept_keys, keys_BGWD), (kept_values, values_BGWD)):
            window_BGWD = kept_BGSD[:, :, self.start : stop]
            if self.replaced_BW is not None:
                replaced_BW = self.replaced_BW.to(new_BGWD.device)
                new_BGWD = torch.where(replaced_BW[:, None, :, None], new_BGWD, window_BGWD)
            window_BGWD.copy_(new_BGWD)
        return kept_keys[:, :, : self.num_keys], kept_values[:, :, : self.num_keys]


class TransformersWindow(NamedTuple):
    """A cache of transformers as one forward pass sees and changes it; see `CacheWindow`.

    Attributes:
        cache: A `transformers.Cache` that grows with the columns.
        start: Columns that it holds already.
        num_keys: Columns K that it will hold after the pass.
    """

    cache: Any
    start: int
    num_keys: int

    @classmethod
    def from_cache(cls, cache: Any, num_new: int) -> TransformersWindow:
        """Opens a cache for the columns that follow those that it holds.

        Args:
            cache: A `transformers.Cache`.
            num_new: Columns of the pass.

        Returns:
            What the pass needs of it.
        """
        start = int(cache.get_seq_length())
        return cls(cache, start, start + num_new)

    def store(self, layer: int, keys_BGWD: Tensor, values_BGWD: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the window's keys and values of one layer; gives those of all columns."""
        keys_BGKD, values_BGKD = self.cache.update(keys_BGWD, values_BGWD, layer)
        return keys_BGKD, values_BGKD


class MdmDenoiser:
    """Logits of the positions that a sampler asks for, with or without a cache.

    The output layer runs on the needed positions only. So does the last block, except for its keys
    and values, unless the model is causal. Without a cache every pass computes all columns. The
    cache of a causal model is always on and exact, since no position answers to a later one.

    The cache of a masked-diffusion model is an approximation. The first pass of a block computes
    all columns. A further pass computes anew, in each sequence, the positions whose logits are
    needed or were needed before in this block, and so all those that the block has unmasked; every
    other position keeps the keys and values that it had at the last full pass, though in truth it
    would answer to each token unmasked since. Under the orders that look at the logits these
    positions are the whole block, under the others those unmasked so far. With
    `cache_refresh_steps=1` every pass is full: nothing is approximated, or saved.

    Args:
        model: An `MdmForMaskedLM`.
        attention_mask: [B, S] over all columns, 1 real, 0 padding; None: no padding. A batch of
            [2B, S] tokens, which guidance makes, repeats it.
        use_cache: Keep keys and values between passes; always so if the model is causal.
        cache_refresh_steps: Compute all columns at every so many steps of a block, too; None: only
            at its first.

    Where the hidden state before a position predicts it (`config.is_shifted`), the state that a
    pass computes is that one. With `config.prefix_lm` the first pass of a causal model lets the
    tokens of the prompt see each other.

    Source:
        Wu et al. 2025, "Fast-dLLM" (block-wise cache of bidirectional attention).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attention_mask: Tensor | None = None,
        *,
        use_cache: bool = False,
        cache_refresh_steps: int | None = None,
    ) -> None:
        self._model = model
        self._mask_BS = attention_mask
        self._is_causal = model.config.is_causal
        self._is_shifted = model.config.is_shifted and not model.config.is_causal
        self._sees_prompt = model.config.prefix_lm and model.config.is_causal
        self._use_cache = use_cache or self._is_causal
        self._refresh_steps = cache_refresh_steps
        self._cache: BlockCache | None = None
        self._touched_BS: Tensor | None = None

    def logits_at(self, x_BS: Tensor, needed_BS: Tensor, window: Window) -> Tensor:
        """Runs the model once.

        Args:
            x_BS: Tokens [B, S], int64, with mask tokens.
            needed_BS: Bool [B, S], True where logits are wanted.
            window: The columns whose tokens may have changed since the pass before, and how many
                passes the block has had.

        Returns:
            Logits [T, V], rows in row-major order of `needed_BS`.
        """
        logits_TV: Tensor = self._model.output_logits(self._compute_hidden(x_BS, needed_BS, window))
        return logits_TV

    def guided_logits_at(
        self, x_2BS: Tensor, needed_2BS: Tensor, window: Window, guidance_scale: float
    ) -> Tensor:
        """Runs the model once for both passes of guidance.

        Args:
            x_2BS: Tokens [2B, S], int64: the sequences, then the same without their prompts.
            needed_2BS: Bool [2B, S], True where logits are wanted; both halves are alike.
            window: As in `logits_at`.
            guidance_scale: Weight w of u + (w + 1) * (c - u).

        Returns:
            Guided logits [T, V], rows in row-major order of half of `needed_2BS`.
        """
        hidden_2TH = self._compute_hidden(x_2BS, needed_2BS, window)
        # In float32, as logits would be combined.
        wide = torch.promote_types(hidden_2TH.dtype, torch.float32)
        conditional_TH, unconditional_TH = hidden_2TH.to(wide).chunk(2)
        guided_TH = guided_logits(conditional_TH, unconditional_TH, guidance_scale)
        logits_TV: Tensor = self._model.output_logits(guided_TH.to(hidden_2TH.dtype))
        return logits_TV

    def _compute_hidden(self, x_BS: Tensor, needed_BS: Tensor, window: Window) -> Tensor:
        """Computes the normed hidden states [T, H] of the needed positions."""
        mask_BS, positions_BW = self._mask_BS, None
        if mask_BS is not None:
            mask_BS = mask_BS.repeat(x_BS.shape[0] // mask_BS.shape[0], 1)
        asked_BS = find_predictors(needed_BS, mask_BS) if self._is_shifted else needed_BS
        start, stop, opened = self._open_cache(x_BS, needed_BS | asked_BS, window)
        if mask_BS is not None:
            positions_BW = count_positions(mask_BS)[:, start:stop]
        if self._sees_prompt and start == 0:
            mask_BS = _see_all(x_BS[:, :stop], mask_BS)
        needed_BW = asked_BS[:, start:stop]
        picked_BQ = None if self._is_causal else _choose_columns(needed_BW)
        inputs = x_BS[:, start:stop], mask_BS, positions_BW, opened, picked_BQ
        hidden_BQH = self._model.model(*inputs, log_snr=window.log_snr_B)
        if picked_BQ is not None:
            needed_BW = needed_BW.gather(1, picked_BQ)
        hidden_TH: Tensor = hidden_BQH[needed_BW]
        return hidden_TH

    def _open_cache(
        self, x_BS: Tensor, needed_BS: Tensor, window: Window
    ) -> tuple[int, int, CacheWindow | None]:
        """Decides which columns the pass computes, and what of it the cache takes."""
        num_columns = x_BS.shape[1]
        if not self._use_cache:
            return 0, num_columns, None
        is_first = window.step == 0
        if self._cache is None or self._cache.shape != x_BS.shape:
            is_first = True
            self._cache = BlockCache(x_BS.shape[0], num_columns, is_causal=self._is_causal)
        if self._is_causal:
            start = 0 if is_first else window.start
            return start, window.stop, self._cache.open_window(start, window.stop)
        touched_BS = needed_BS
        if self._touched_BS is not None and not is_first:
            touched_BS = touched_BS | self._touched_BS
        self._touched_BS = touched_BS
        refresh_steps = self._refresh_steps
        if is_first or (refresh_steps is not None and window.step % refresh_steps == 0):
            return 0, num_columns, self._cache.open_window(0, num_columns)
        columns = touched_BS.any(dim=0).nonzero().flatten()
        start, stop = int(columns[0]), int(columns[-1]) + 1
        touched_BW = touched_BS[:, start:stop]
        # Columns needed by other sequences alone keep theirs: results must not depend on the batch.
        replaced_BW = None if bool(touched_BW.all()) else touched_BW
        return start, stop, self._cache.open_window(start, stop, replaced_BW)


def count_positions(attention_mask: Tensor) -> Tensor:
    """Counts the real tokens before each one.

    Args:
        attention_mask: [B, S], 1 real, 0 padding.

    Returns:
        Rotary positions int64 [B, S]; those of padding mean nothing.
    """
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def find_predictors(needed_BS: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Finds the positions whose hidden states predict others: the real ones before them.

    Args:
        needed_BS: Bool, True where a prediction is wanted.
        attention_mask: [B, S], 1 real, 0 padding, which is passed over; None: no padding.

    Returns:
        Bool [B, S], in each row as many True as before and in the same order.

    Raises:
        ValueError: Nothing stands before a position.
    """
    columns_S = torch.arange(needed_BS.shape[1], device=needed_BS.device)
    real_BS = torch.ones_like(needed_BS) if attention_mask is None else attention_mask.bool()
    # The last real column up to each; -1 where there is none.
    last_BS = torch.where(real_BS, columns_S, -1).cummax(dim=1).values
    before_BS = torch.nn.functional.pad(last_BS[:, :-1], (1, 0), value=-1)
    rows_T, columns_T = needed_BS.nonzero(as_tuple=True)
    found_T = before_BS[rows_T, columns_T]
    if bool((found_T < 0).any()):
        raise ValueError(
            "The first token of a sequence is hidden, and this model predicts a token from the one "
            "before it: give a token to begin with, such as the end of text."
        )
    asked_BS = torch.zeros_like(needed_BS)
    asked_BS[rows_T, found_T] = True
    return asked_BS


def _see_all(x_BW: Tensor, attention_mask: Tensor | None) -> Tensor:
    """A mask [B, W, W] by which every real column, and the column itself, is seen."""
    num_rows, width = x_BW.shape
    itself_WW = torch.eye(width, dtype=torch.bool, device=x_BW.device)
    if attention_mask is None:
        return itself_WW.new_ones(num_rows, width, width)
    return attention_mask[:, None, :width].bool() | itself_WW


def _choose_columns(needed_BW: Tensor) -> Tensor | None:
    """Needed columns of each row, [B, Q], filled up with others; None if a row needs all."""
    most = int(needed_BW.sum(dim=1).max())
    if most == needed_BW.shape[1]:
        return None
    return needed_BW.int().argsort(dim=1, descending=True, stable=True)[:, :most]
