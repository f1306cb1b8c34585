"""The exported models: a masked-diffusion or a causal transformer in plain torch.

The file imports only torch, transformers and its neighbours in the export folder. It is loaded from
there by transformers; the package itself never imports it.

Shapes: B batch, S sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput

# transformers before 5.10 copies what this file imports, and not what those files import in turn.
from .attention_mdm import MdmAttention  # noqa: F401
from .backbone_mdm import MdmBackbone, PassRecord
from .block_steps import share_steps  # noqa: F401
from .caching_mdm import TransformersWindow
from .configuration_mdm import MdmConfig
from .decoding import Decoding  # noqa: F401
from .generation_mdm import MdmGeneration
from .interpolation import read_noise  # noqa: F401
from .noise_sampler import sample_noise  # noqa: F401
from .sampler_state import SamplerState  # noqa: F401
from .samplers import sample  # noqa: F401
from .time_features import compute_time_features  # noqa: F401
from .token_choice import choose_tokens  # noqa: F401


class MdmLanguageModel(PreTrainedModel):
    """The transformer with its output layer: what all exported models share."""

    config_class = MdmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["MdmLayer"]  # noqa: RUF012

    def __init__(self, config: MdmConfig) -> None:
        super().__init__(config)
        self.model = MdmBackbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embedding, which has one row more than the output layer for the mask."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module | None:
        """Returns the output layer, or None when the embedding takes its place."""
        return None if self.config.tie_word_embeddings else self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces the output layer."""
        self.lm_head = new_embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Module:
        """Resizes the vocabulary as transformers does; the mask token keeps its id and its row.

        Afterwards every row of the embedding has a logit. That of the mask token is -inf, and so
        are those of the rows before it that no token uses.

        Args:
            new_num_tokens: Rows of the embedding, more than `mask_token_id`; None: as they are.
            *args: See `PreTrainedModel.resize_token_embeddings`.
            **kwargs: See `PreTrainedModel.resize_token_embeddings`.

        Returns:
            The embedding.

        Raises:
            ValueError: The mask token would lose its row.
        """
        mask_token_id, vocab_size = self.config.mask_token_id, self.config.vocab_size
        if new_num_tokens is not None and new_num_tokens <= mask_token_id:
            raise ValueError(
                f"new_num_tokens={new_num_tokens} leaves no row for the mask token "
                f"{mask_token_id}: use {mask_token_id + 1} or more, as the tokenizer of the export "
                "has tokens."
            )
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if self.config.vocab_size != vocab_size:
            self.config.padded_vocab_size = self.config.vocab_size
            if vocab_size < mask_token_id:
                self.config.unused_token_ids = [vocab_size, mask_token_id]
        return embeddings

    def output_logits(self, hidden: Tensor) -> Tensor:
        """Maps normed hidden states [.., H] to logits [.., V], -inf for a mask token among them."""
        # What stands beyond V is the mask's row or no token's.
        if self.config.tie_word_embeddings:
            logits = F.linear(hidden, self.model.embed_tokens.weight[: self.config.vocab_size])
        else:
            # Called, since adapters, quantisation and offloading change what a layer does.
            logits = self.lm_head(hidden)[..., : self.config.vocab_size]
        if self.config.mask_token_id < self.config.vocab_size:
            mask_id = torch.tensor(self.config.mask_token_id, device=logits.device)
            logits.index_fill_(-1, mask_id, -torch.inf)
        if self.config.unused_token_ids is not None:
            start, stop = self.config.unused_token_ids
            logits[..., start:stop] = -torch.inf
        return logits

    @property
    def predicts_from_before(self) -> bool:
        """Are the logits of a masked token those of the hidden state before it?"""
        return bool(self.config.is_shifted and not self.config.is_causal)

    def _make_record(self, with_hidden: bool | None, with_weights: bool | None) -> PassRecord:
        """What to keep of a pass: as asked, or else as the configuration says."""
        if with_hidden is None:
            with_hidden = self.config.output_hidden_states
        if with_weights is None:
            with_weights = self.config.output_attentions
        return PassRecord([] if with_hidden else None, [] if with_weights else None)

    def _convert_output(self, output: Any, return_dict: bool | None) -> Any:
        """Gives a tuple where that is asked for."""
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()


class MdmForMaskedLM(MdmGeneration, MdmLanguageModel):
    """Masked-diffusion language model: logits of the original token at every position.

    With `config.is_causal` the same class holds an autoregressive baseline, whose logits are those
    of the next token. `generate` and `infill` are described in `generation_mdm`.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        log_snr: Tensor | None = None,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Predicts the token at every position (of the next one if the model is causal).

        Args:
            input_ids: Tokens [B, S], int64, in 0..V-1 or `mask_token_id`.
            attention_mask: [B, S], 1 real, 0 padding, which real tokens never see; None: no
                padding. Logits at padding mean nothing.
            labels: Targets [B, S], int64, compared position by position (shift them yourself for
                a causal model); -100 is left out.
            position_ids: Rotary positions [B, S] or [1, S]; default 0..S-1.
            inputs_embeds: Embeddings [B, S, H] in place of `input_ids`.
            output_attentions: Give the attention weights as well, which takes S x S numbers per
                head.
            output_hidden_states: Give the hidden states as well: the embeddings, the output of
                every block but the last, and the normed output.
            return_dict: False: a tuple of what there is.
            log_snr: Log-SNR [B] of the noise of each sequence, ln(a / (1 - a)) with a the chance
                that a token is clean; needed where `config.time_embedding`, and else not read.

        Returns:
            `logits` [B, S, V], with -inf for a mask token inside the vocabulary, and `loss`, the
            cross entropy averaged over the labels, in nats, if there are labels. Where
            `config.is_shifted`, and attention is not causal, nothing predicts the first position:
            all its tokens are as likely.
        """
        record = self._make_record(output_hidden_states, output_attentions)
        hidden_BSH = self.model(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds=inputs_embeds,
            record=record,
            log_snr=log_snr,
        )
        logits_BSV = self.output_logits(hidden_BSH)
        if self.predicts_from_before:
            logits_BSV = _move_right(logits_BSV)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BSV.flatten(0, 1).float(), labels.flatten())
        output = MaskedLMOutput(loss, logits_BSV, *record.to_outputs())
        return self._convert_output(output, return_dict)


class MdmForCausalLM(MdmLanguageModel, GenerationMixin):
    """An autoregressive export as other programs expect one: `generate` is transformers' own.

    Raises:
        ValueError: The model is not causal.
    """

    _supports_cache_class = True

    def __init__(self, config: MdmConfig) -> None:
        if "ar" in (config.run_ways or ()):
            config.is_causal = True
        if not config.is_causal:
            raise ValueError(
                "This is a masked-diffusion model, which predicts no next token: load it with "
                "AutoModelForMaskedLM."
            )
        super().__init__(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Predicts the token after every position.

        Args:
            input_ids: Tokens [B, W], int64, those after the cached ones.
            attention_mask: [B, S] over the cached columns and these, 1 real, 0 padding.
            position_ids: Rotary positions [B, W] or [1, W]; default: the columns.
            past_key_values: A `transformers.DynamicCache`, which takes these columns' keys and
                values.
            inputs_embeds: Embeddings [B, W, H] in place of `input_ids`.
            labels: Tokens [B, W], the same as `input_ids`: they are shifted here; -100 is left out.
            use_cache: Make a cache where none is given.
            output_attentions: Give the attention weights as well, which takes W x S numbers per
                head.
            output_hidden_states: Give the hidden states as well: the embeddings, the output of
                every block but the last, and the normed output.
            return_dict: False: a tuple of what there is.
            cache: The name of `past_key_values` in newer versions of transformers.
            logits_to_keep: Give the logits of the last so many positions alone, or of these
                positions; 0: of all.

        Returns:
            `logits` [B, W, V], the cache, and with labels `loss`, the cross entropy
            averaged over them, in nats.
        """
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        record = self._make_record(output_hidden_states, output_attentions)
        window = None
        if cache is not None:
            given = input_ids if inputs_embeds is None else inputs_embeds
            window = TransformersWindow.from_cache(cache, 0 if given is None else given.shape[1])
        hidden_BWH = self.model(
            input_ids, attention_mask, position_ids, window, None, inputs_embeds, record
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.output_logits(hidden_BWH[:, kept])
        loss = None
        if labels is not None:
            predicted, following = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            loss = F.cross_entropy(predicted, following)
        # By place, since the name of the cache's field depends on the version.
        output = CausalLMOutputWithPast(loss, logits, cache, *record.to_outputs())
        return self._convert_output(output, return_dict)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Prepares a step of `generate` as transformers does; see `GenerationMixin`."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        # Versions before 5.0 add what the cache knows anyhow.
        inputs.pop("cache_position", None)
        return inputs


def _move_right(logits_BSV: Tensor) -> Tensor:
    """Moves logits one position to the right; at the first all possible tokens are alike."""
    first_B1V = logits_BSV[:, :1]
    alike_B1V = torch.where(first_B1V == -torch.inf, first_B1V, 0.0)
    return torch.cat([alike_B1V, logits_BSV[:, :-1]], dim=1)
