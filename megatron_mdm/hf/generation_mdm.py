"""How an exported model continues prompts and unmasks mask tokens.

The file travels with every export and imports nothing but its neighbours there.

Shapes: B sequences, P prompt columns, Q suffix columns, S columns in all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from .caching_mdm import MdmDenoiser
from .decoding import DECODING_FILE, Decoding
from .interpolation import Interpolation, read_noise
from .noise_sampler import sample_noise
from .samplers import StepCallback, sample, sample_left_to_right

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_GENERATE_ONLY = ("max_new_tokens", "stop_at_end")


class MdmGeneration(PreTrainedModel):
    """Base of `MdmForMaskedLM`: `generate`, `infill`, and the defaults that its folder may hold.

    The options of both are those of `Decoding`. Each comes from the call, or else from
    its `generation_config`, or else from `generation_defaults`, which `from_pretrained` reads from
    the folder's mdm_generation_config.json where there is one.

    (The name avoids the ending by which transformers recognises models that generate with its own
    loop, and sets them up for it.)
    """

    generation_defaults = Decoding()

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        generation_config: Decoding | Mapping[str, Any] | None = None,
        suffix_ids: Tensor | None = None,
        suffix_attention_mask: Tensor | None = None,
        guidance_ids: Tensor | None = None,
        seeds: Sequence[int] | None = None,
        callback: StepCallback | None = None,
        **overrides: Any,
    ) -> Tensor:
        """Continues prompts, or infills the middle between prompts and suffixes.

        Mask tokens are put after the prompts and unmasked in the order that the options ask for. A
        causal model samples from left to right instead, and refuses the options that only masked
        diffusion has. What becomes of a sequence depends neither on its batch mates nor on padding,
        but for the rounding of the logits.

        Args:
            input_ids: Prompts [B, P], int64, P at least 0 (one real token each if causal or
                `config.is_shifted`); mask tokens among them are unmasked as well.
            attention_mask: [B, P], 1 real, 0 padding, on either side; None: no padding.
            generation_config: Options, as an object or by name.
            suffix_ids: Tokens [B, Q] that follow the generated ones.
            suffix_attention_mask: [B, Q], as `attention_mask`.
            guidance_ids: Tokens [B, P] that take the prompt's place in the second pass of guidance,
                padded as the prompt is; None: mask tokens take the place of prompt and suffix
                (unsupervised guidance).
            seeds: One seed per sequence, within 64 bits, in place of those made from `seed`.
            callback: Called after each step with a `samplers.SamplingStep`, laid out as the result.
            **overrides: Options by name.

        Returns:
            [B, P + max_new_tokens + Q]: each prompt, padded on the left; the new tokens, in the
            same columns for every sequence; its suffix, padded on the right. Shorter if every
            sequence of a causal model has ended. Padding is `config.pad_token_id`, or else
            `eos_token_id`, or else the mask token.

        Raises:
            ValueError: The tokens or the options do not fit the model.
        """
        options = self._resolve_options(generation_config, overrides)
        if self.config.is_causal:
            _check_causal(options, suffix_ids, guidance_ids)
        prompt_BP, real_BP = self._read("input_ids", input_ids, attention_mask)
        to_right_BP = real_BP.int().argsort(dim=1, stable=True)
        new_size = (prompt_BP.shape[0], options.max_new_tokens)
        parts = [prompt_BP.gather(1, to_right_BP), prompt_BP.new_full(new_size, self._mask_id)]
        reals = [real_BP.gather(1, to_right_BP), real_BP.new_ones(new_size)]
        if suffix_ids is not None:
            suffix_BQ, real_BQ = self._read("suffix_ids", suffix_ids, suffix_attention_mask)
            to_left_BQ = real_BQ.int().argsort(dim=1, descending=True, stable=True)
            parts.append(suffix_BQ.gather(1, to_left_BQ))
            reals.append(real_BQ.gather(1, to_left_BQ))
        elif options.end_token_id is None and options.stop_at_end:
            options = options.override({"end_token_id": self.config.eos_token_id})
        real_BS = torch.cat(reals, dim=1)
        x_BS = torch.cat(parts, dim=1).masked_fill(~real_BS, self._pad_id)
        if self.config.is_causal:
            return self._continue(x_BS, real_BS, options, seeds, callback)
        guidance_BS = None
        if guidance_ids is not None:
            _check_shape("guidance_ids", guidance_ids, input_ids)
            guidance_BP, _ = self._read("guidance_ids", guidance_ids, attention_mask)
            guidance_BS = torch.cat([guidance_BP.gather(1, to_right_BP), *parts[1:]], dim=1)
        if self.noise is None:
            options = options.resolve(continues=suffix_ids is None)
        return self._unmask(x_BS, real_BS, options, guidance_BS, seeds, callback)

    @torch.no_grad()
    def infill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        generation_config: Decoding | Mapping[str, Any] | None = None,
        prompt_mask: Tensor | None = None,
        guidance_ids: Tensor | None = None,
        seeds: Sequence[int] | None = None,
        callback: StepCallback | None = None,
        **overrides: Any,
    ) -> Tensor:
        """Unmasks every mask token, wherever it stands.

        Args:
            input_ids: Tokens [B, S], int64, with any pattern of `config.mask_token_id`.
            attention_mask: [B, S], 1 real, 0 padding, anywhere; None: no padding.
            generation_config: Options, as an object or by name.
            prompt_mask: Bool [B, S], what guidance hides behind mask tokens in its second pass;
                None: every token given.
            guidance_ids: Tokens [B, S] of the second pass at the positions that are not masked, in
                place of `prompt_mask`.
            seeds: See `generate`.
            callback: See `generate`.
            **overrides: Options by name, but none that only `generate` has.

        Returns:
            [B, S], the tokens, every mask token unmasked; padding as it was.

        Raises:
            ValueError: The model is causal, or the tokens or the options do not fit it.
        """
        if self.config.is_causal:
            raise ValueError(
                "is_causal=True: an autoregressive model cannot fill masks, use generate without "
                "a suffix."
            )
        for name in _GENERATE_ONLY:
            if name in overrides:
                raise ValueError(f"{name} is an option of generate, infill has no use for it.")
        if guidance_ids is not None and prompt_mask is not None:
            raise ValueError("prompt_mask and guidance_ids exclude each other: pass one of them.")
        options = self._resolve_options(generation_config, overrides)
        x_BS, real_BS = self._read("input_ids", input_ids, attention_mask)
        guidance_BS = None
        if prompt_mask is not None:
            _check_shape("prompt_mask", prompt_mask, input_ids)
            guidance_BS = x_BS.masked_fill(prompt_mask.bool(), self._mask_id)
        if guidance_ids is not None:
            _check_shape("guidance_ids", guidance_ids, input_ids)
            guidance_BS, _ = self._read("guidance_ids", guidance_ids, attention_mask)
        return self._unmask(x_BS, real_BS, options, guidance_BS, seeds, callback)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Loads a model as transformers does, with the folder's generation defaults.

        Args:
            pretrained_model_name_or_path: Folder or name of an export.
            *args: See `PreTrainedModel.from_pretrained`.
            **kwargs: See `PreTrainedModel.from_pretrained`.

        Returns:
            The model, with the loading info if that was asked for.

        Raises:
            ValueError: mdm_generation_config.json holds something else.
        """
        path = None
        if pretrained_model_name_or_path is not None:
            path = cached_file(
                pretrained_model_name_or_path,
                DECODING_FILE,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                **{name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs},
            )
        defaults = None if path is None else Decoding.load(Path(path))
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if defaults is not None:
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model.generation_defaults = defaults
        return loaded

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Saves the model as transformers does, with its generation defaults.

        Args:
            save_directory: Folder to write.
            is_main_process: This process writes.
            **kwargs: See `PreTrainedModel.save_pretrained`.
        """
        if is_main_process:
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            self.generation_defaults.save(folder)
        super().save_pretrained(save_directory, is_main_process, **kwargs)

    @property
    def noise(self) -> Interpolation | None:
        """What took the place of tokens in training; None: the mask token alone."""
        return None if self.config.noise is None else read_noise(self.config.noise)

    @property
    def _mask_id(self) -> int:
        return int(self.config.mask_token_id)

    @property
    def _pad_id(self) -> int:
        choices = (self.config.pad_token_id, self.config.eos_token_id, self._mask_id)
        return next(choice for choice in choices if choice is not None)

    @property
    def _filler_id(self) -> int:
        """What the model reads as padding, which it never attends to: any token but the mask."""
        return 0 if self._mask_id != 0 else 1

    def _resolve_options(
        self,
        generation_config: Decoding | Mapping[str, Any] | None,
        overrides: Mapping[str, Any],
    ) -> Decoding:
        options: Any = {} if generation_config is None else generation_config
        if isinstance(options, Mapping):
            options = self.generation_defaults.override(options)
        return options.override(overrides)

    def _read(self, name: str, ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Checks tokens, and returns them with a bool of the same shape, True where real."""
        if ids.dim() != 2 or ids.dtype != torch.int64:
            raise ValueError(
                f"{name} has {ids.dim()} dimensions and dtype {ids.dtype}: pass int64 tokens of "
                "2 dimensions, one row per sequence."
            )
        real = torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is not None:
            _check_shape(f"the attention mask of {name}", attention_mask, ids)
            real = attention_mask.bool()
        is_known = ((ids >= 0) & (ids < self.config.vocab_size)) | (ids == self._mask_id)
        unknown = ids[real & ~is_known]
        if len(unknown):
            raise ValueError(
                f"{name} holds the token {int(unknown[0])}: tokens are 0 to "
                f"{self.config.vocab_size - 1} and the mask {self._mask_id}."
            )
        return ids, real

    def _unmask(
        self,
        x_BS: Tensor,
        real_BS: Tensor,
        options: Decoding,
        guidance_BS: Tensor | None,
        seeds: Sequence[int] | None,
        callback: StepCallback | None,
    ) -> Tensor:
        """Unmasks the mask tokens; `guidance_BS` [B, S] is what guidance's second pass sees."""
        self._check_length(real_BS)
        if guidance_BS is not None and options.guidance_scale == 0.0:
            raise ValueError(
                "guidance_ids and prompt_mask have no effect at guidance_scale=0: set the scale."
            )
        guidance_BS = torch.full_like(x_BS, self._mask_id) if guidance_BS is None else guidance_BS
        run = sample
        if self.noise is not None:
            told = self.config.time_embedding
            run = partial(sample_noise, noise=self.noise, tells_log_snr=told)
        sampled_BS = run(
            self._make_denoiser(real_BS, options),
            x_BS.masked_fill(~real_BS, self._filler_id),
            decoding=options,
            mask_token_id=self._mask_id,
            vocab_size=self.config.vocab_size,
            guidance_tokens_BS=guidance_BS.masked_fill(~real_BS, self._filler_id),
            seeds=seeds,
            callback=_wrap(callback, x_BS, real_BS),
        )
        return _restore_padding(sampled_BS, x_BS, real_BS)

    def _continue(
        self,
        x_BS: Tensor,
        real_BS: Tensor,
        options: Decoding,
        seeds: Sequence[int] | None,
        callback: StepCallback | None,
    ) -> Tensor:
        """Continues the prompts, which are followed by as many masks as there are new tokens."""
        self._check_length(real_BS)
        num_prompt_columns = x_BS.shape[1] - options.max_new_tokens
        if not bool(real_BS[:, :num_prompt_columns].any(dim=1).all()):
            raise ValueError(
                "A prompt has 0 tokens, an autoregressive model needs at least 1: add the end of "
                "text."
            )
        continued_BS = sample_left_to_right(
            self._make_denoiser(real_BS, options),
            x_BS.masked_fill(~real_BS, self._filler_id)[:, :num_prompt_columns],
            options,
            mask_token_id=self._mask_id,
            vocab_size=self.config.vocab_size,
            seeds=seeds,
            callback=_wrap(callback, x_BS, real_BS),
        )
        return _restore_padding(continued_BS, x_BS, real_BS)

    def _make_denoiser(self, real_BS: Tensor, options: Decoding) -> MdmDenoiser:
        return MdmDenoiser(
            self,
            None if bool(real_BS.all()) else real_BS,
            use_cache=options.use_cache,
            cache_refresh_steps=options.cache_refresh_steps,
        )

    def _check_length(self, real_BS: Tensor) -> None:
        longest = max(real_BS.sum(dim=1).tolist(), default=0)
        if longest > self.config.max_position_embeddings:
            raise ValueError(
                f"The longest sequence has {longest} tokens, more than "
                f"max_position_embeddings={self.config.max_position_embeddings}: generate fewer "
                "tokens or shorten the prompt."
            )


def _check_shape(name: str, tensor: Tensor, ids: Tensor) -> None:
    if tensor.shape != ids.shape:
        raise ValueError(
            f"{name} has the shape {tuple(tensor.shape)}, the tokens {tuple(ids.shape)}: make them "
            "the same."
        )


def _check_causal(
    options: Decoding, suffix_ids: Tensor | None, guidance_ids: Tensor | None
) -> None:
    """Refuses what a causal model cannot do, before anything runs."""
    options.check_autoregressive()
    for name, value in (("suffix_ids", suffix_ids), ("guidance_ids", guidance_ids)):
        if value is not None:
            raise ValueError(
                f"{name} is for masked diffusion, and this model is autoregressive: leave it out."
            )


def _restore_padding(tokens: Tensor, x_BS: Tensor, real_BS: Tensor) -> Tensor:
    """Puts the caller's padding back; `tokens` may lack the last columns of `x_BS`."""
    width = tokens.shape[1]
    return torch.where(real_BS[:, :width], tokens, x_BS[:, :width])


def _wrap(callback: StepCallback | None, x_BS: Tensor, real_BS: Tensor) -> StepCallback | None:
    """Shows the callback the padding that the result will have."""
    if callback is None:
        return None
    return lambda step: callback(step._replace(x_BS=_restore_padding(step.x_BS, x_BS, real_BS)))
