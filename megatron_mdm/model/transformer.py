"""The model: Megatron-Core's blocks with our head, for masked diffusion and AR alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from megatron_mdm.config import Config, ModelConfig, ParallelConfig
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.diffusion.attention_rules import FullAttention
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.diffusion.samples import BLOCK_SCALES, LOG_SNR, POSITION_IDS
from megatron_mdm.distributed.mesh import Mesh
from megatron_mdm.model.attention import AttentionInputs
from megatron_mdm.model.attention_mask import (
    AttentionMask,
    build_attention_mask,
    suits_flex_attention,
)
from megatron_mdm.model.block_config import BlockConfig
from megatron_mdm.model.elementwise import Rotation
from megatron_mdm.model.head import CROSS_ENTROPY, Predictions
from megatron_mdm.model.initialization import initialize
from megatron_mdm.model.interleaving import InterleavedStage
from megatron_mdm.model.layers import build_block_submodules
from megatron_mdm.model.loss_heads import LossHead, build_held_out_head, build_loss_head
from megatron_mdm.model.recomputation import Recompute
from megatron_mdm.model.shards import name_shards
from megatron_mdm.model.time_embedding import TimeEmbedding
from megatron_mdm.model.vocabulary import VocabularySlice

CompileMode = Literal["auto", "on", "off"]


class DiffusionTransformer(GPTModel):
    """One pipeline stage of the transformer, or one chunk of it, from tokens to losses.

    The network sees the noised tokens alone, and with `model.time_embedding` their log-SNR.

    Args:
        config: Megatron's configuration.
        model: Sizes.
        attention: Which tokens see which, where a batch does not say it.
        loss_head: The loss in training.
        held_out_head: The loss in evaluation.
        recompute: What each layer recomputes in the backward pass.
        seq_length: Longest sequence.
        mesh: This rank's place.
        chunk: Which of the stage's parts of the model; 0 where there is one.
    """

    def __init__(
        self,
        config: BlockConfig,
        model: ModelConfig,
        *,
        attention: FullAttention,
        loss_head: LossHead = CROSS_ENTROPY,
        held_out_head: LossHead = CROSS_ENTROPY,
        recompute: Recompute,
        seq_length: int,
        mesh: Mesh,
        chunk: int = 0,
    ) -> None:
        last_chunk = (config.virtual_pipeline_model_parallel_size or 1) - 1
        super().__init__(
            config=config,
            transformer_layer_spec=build_block_submodules(
                config, causal=attention.is_causal, recompute=recompute, chunk=chunk
            ),
            vocab_size=model.embedding_rows,
            max_sequence_length=seq_length,
            pre_process=mesh.pp.is_first and chunk == 0,
            post_process=mesh.pp.is_last and chunk == last_chunk,
            share_embeddings_and_output_weights=model.tie_embeddings,
            # Attention turns queries and keys itself.
            position_embedding_type="none",
            vp_stage=chunk,
        )
        if self.post_process:
            if not model.tie_embeddings:
                _resize_head(self.output_layer, model.head_rows, mesh.tp.size)
            num_rows = model.head_rows // mesh.tp.size
            self._rows = VocabularySlice(
                mesh.tp.rank * num_rows,
                num_rows,
                model.vocab_size,
                model.mask_id,
                mesh.get_group("tp"),
            )
        self.time_embedding: TimeEmbedding | None = None
        if self.pre_process and model.time_embedding:
            part = mesh.tp.rank if config.sequence_parallel else None
            self.time_embedding = TimeEmbedding(model.hidden_size, part)
        self.sizes = model
        self._rule = attention
        self._loss_head, self._held_out_head = loss_head, held_out_head
        self._rotary_base = model.rotary_base
        self._rotation: Rotation | None = None

    def forward(
        self,
        inputs_BS: Tensor,
        targets_BS: Tensor | None = None,
        weights_BS: Tensor | None = None,
        lengths_B: Tensor | None = None,
        positions_M: Tensor | None = None,
        model_inputs: Mapping[str, Tensor] | None = None,
        loss_inputs: Mapping[str, Tensor] | None = None,
        attention: FullAttention | None = None,
    ) -> Tensor:
        """Runs this stage or chunk.

        Args:
            inputs_BS: int64 [B, S], tokens that the model sees.
            targets_BS: int64 [B, S], tokens to predict; None: return logits.
            weights_BS: float32 [B, S], weight of each prediction; 0 leaves it out.
            lengths_B: int64 [B], tokens of each sequence that may be attended to; None: all.
            positions_M: int64 [M], where `weights_BS` is not 0, as indices into the flattened
                batch; -1 pads to shapes that repeat. None: they are looked up, for which the host
                waits for a GPU.
            model_inputs: By name. `position_ids`: int64 [B, S], where in the text each token
                stands, if not in the order given; `block_scales`: float32 [B, layers], of the
                layers' changes of the residual stream, in training alone; `log_snr`: float32
                [B, 1] or [B, S], with `model.time_embedding`; the rest is for the attention mask.
            loss_inputs: What else the loss head needs, by name: float32 [B, S].
            attention: Which tokens see which; None: as the model was built.

        Returns:
            Before the end of the model hidden states [S, B, H]. There the weighted losses of each
            sequence, float32 [B], for their sum or mean (`ChunkedLinearLoss`); without targets the
            logits, float [B, S, vocab rows].
        """
        hidden_SBH = self.embedding(inputs_BS, None) if self.pre_process else None
        more, rule = model_inputs or {}, attention or self._rule
        if self.time_embedding is not None:
            hidden_SBH = self.time_embedding(hidden_SBH, more.get(LOG_SNR))
        rotation = self.get_rotation(inputs_BS.shape[1], inputs_BS.device)
        if POSITION_IDS in more:
            rotation = rotation.gather(more[POSITION_IDS])
        hidden_SBH = self.decoder(
            hidden_states=hidden_SBH,
            attention_mask=AttentionInputs(
                self._build_attention_mask(inputs_BS, lengths_B, rule, more),
                rotation,
                more.get(BLOCK_SCALES) if self.training else None,
                rule.is_causal,
            ),
        )
        if not self.post_process:
            return hidden_SBH
        if self.config.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH)
        if targets_BS is None or weights_BS is None:
            return self._compute_logits(hidden_SBH)
        told = {"inputs": inputs_BS, "targets": targets_BS, "weights": weights_BS}
        return self._compute_losses(hidden_SBH, told | dict(loss_inputs or {}), positions_M)

    def get_rotation(self, seq_length: int, device: torch.device) -> Rotation:
        """Gets the rotary embedding, which is computed once and again where it has to grow.

        Args:
            seq_length: Positions that are needed.
            device: Where.

        Returns:
            Tables of those positions.
        """
        known = self._rotation
        if known is None or len(known.cos_SD) < seq_length or known.cos_SD.device != device:
            width = self.config.kv_channels
            self._rotation = Rotation.build(seq_length, width, self._rotary_base, device)
        assert self._rotation is not None
        return self._rotation.take_first(seq_length)

    def _build_attention_mask(
        self,
        inputs_BS: Tensor,
        lengths_B: Tensor | None,
        rule: FullAttention,
        model_inputs: Mapping[str, Tensor],
    ) -> AttentionMask:
        batch_size, seq_length = inputs_BS.shape
        return build_attention_mask(
            batch_size,
            seq_length,
            lengths_B,
            rule,
            model_inputs,
            device=inputs_BS.device,
            block_sparse=suits_flex_attention(
                inputs_BS.device,
                self.config.kv_channels,
                self.config.attention_dropout if self.training else 0.0,
            ),
            blocks_alone=self.sizes.has_scores,
        )

    def _get_head_weight(self) -> Tensor:
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _compute_losses(
        self, hidden_SBH: Tensor, told: Mapping[str, Tensor], positions_M: Tensor | None
    ) -> Tensor:
        batch_size, seq_length = told["targets"].shape
        if positions_M is None:
            positions_M = torch.nonzero(told["weights"].flatten()).squeeze(-1)
        is_real_M = positions_M >= 0
        positions_M = positions_M.clamp(min=0)
        sequence_M = positions_M // seq_length
        rows_M = positions_M % seq_length * batch_size + sequence_M
        hidden_MH = hidden_SBH.reshape(seq_length * batch_size, -1).index_select(0, rows_M)
        if not self.config.sequence_parallel:
            hidden_MH = copy_to_tensor_model_parallel_region(hidden_MH)
        found = {name: values.flatten()[positions_M] for name, values in told.items()}
        predictions = Predictions(
            found.pop("targets"),
            found.pop("weights").where(is_real_M, 0.0),
            sequence_M,
            batch_size,
            found.pop("inputs"),
            found,
        )
        loss_head = self._loss_head if self.training else self._held_out_head
        losses_B = loss_head(hidden_MH, self._get_head_weight(), predictions, self._rows)
        if losses_B.shape != (batch_size,):
            raise ConfigError(
                f"The loss head {type(loss_head).__name__} of objective.loss_head returns a tensor "
                f"of shape {list(losses_B.shape)} for {batch_size} sequences: let it return the "
                "sum of the weighted losses of each sequence, [B]."
            )
        return losses_B

    def _compute_logits(self, hidden_SBH: Tensor) -> Tensor:
        logits_BSV = F.linear(hidden_SBH, self._get_head_weight()).transpose(0, 1).clone()
        return gather_from_tensor_model_parallel_region(self._rows.exclude(logits_BSV))


def build_model(
    config: Config, mesh: Mesh, dtype: torch.dtype, *, draws_weights: bool = True
) -> DiffusionTransformer | InterleavedStage:
    """Builds this rank's stage of a run.

    Args:
        config: The run.
        mesh: This rank's place.
        dtype: Dtype of forward and backward.
        draws_weights: False leaves the weights as they are, where all of them will be loaded.

    Returns:
        As `build_stage`.
    """
    return build_stage(
        config.model,
        config.parallel,
        build_objective(config).attention,
        config.data.seq_length,
        mesh,
        dtype,
        loss_head=build_loss_head(config),
        held_out_head=build_held_out_head(config),
        seed=config.run.seed if draws_weights else None,
        compile_mode=config.run.compile,
    )


def build_stage(
    model: ModelConfig,
    parallel: ParallelConfig,
    attention: FullAttention,
    seq_length: int,
    mesh: Mesh,
    dtype: torch.dtype,
    *,
    loss_head: LossHead = CROSS_ENTROPY,
    held_out_head: LossHead = CROSS_ENTROPY,
    seed: int | None = 0,
    compile_mode: CompileMode = "auto",
) -> DiffusionTransformer | InterleavedStage:
    """Builds this rank's stage with initial weights that do not depend on the layout.

    Args:
        model: Sizes.
        parallel: How the model is divided over ranks.
        attention: Which tokens see which.
        seq_length: Longest sequence.
        mesh: This rank's place.
        dtype: Dtype of forward and backward.
        loss_head: What the loss is while the model trains.
        held_out_head: What it is in evaluation.
        seed: Of the initial weights; None leaves them as they are.
        compile_mode: `run.compile`.

    Returns:
        The stage, on the device, in float32; the engine casts it. It is interleaved if
        `parallel.virtual_pipeline_model_parallel_size` is more than 1.
    """
    megatron = _build_megatron_config(model, parallel, mesh, dtype, compile_mode)
    with mesh.redirect_cuda():
        chunks = [
            DiffusionTransformer(
                megatron,
                model,
                attention=attention,
                loss_head=loss_head,
                held_out_head=held_out_head,
                recompute=parallel.recompute,
                seq_length=seq_length,
                mesh=mesh,
                chunk=chunk,
            )
            for chunk in range(parallel.virtual_pipeline_model_parallel_size)
        ]
    stage = chunks[0] if len(chunks) == 1 else InterleavedStage(chunks)
    for shard in name_shards(stage, mesh):
        # Megatron leaves the mark out when it does not initialise; gradient norms rest on it.
        shard.parameter.tensor_model_parallel = shard.is_split  # type: ignore[attr-defined]
    if seed is not None:
        initialize(stage, model, seed, mesh)
    return stage.to(mesh.device)


def _build_megatron_config(
    model: ModelConfig, parallel: ParallelConfig, mesh: Mesh, dtype: torch.dtype, mode: CompileMode
) -> BlockConfig:
    """Megatron's configuration of a stage, with CUDA fusions off on a CPU."""
    num_chunks = parallel.virtual_pipeline_model_parallel_size
    is_interleaved = num_chunks > 1
    on_gpu = mesh.device.type == "cuda"
    return BlockConfig(
        compiled=on_gpu if mode == "auto" else mode == "on",
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_width,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=bool(model.qk_norm),
        norms_whole_width=model.qk_norm == "width",
        attention_soft_cap=model.attention_soft_cap,
        attention_sink=model.attention_sink,
        mlp_bias=model.mlp_bias,
        gated_linear_unit=model.mlp == "swiglu",
        activation_func=F.silu,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_chunks if is_interleaved else None,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        params_dtype=torch.float32,
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        bias_activation_fusion=False,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        # Interleaved, two stages are each other's next and previous stage: batched sends would meet
        # the wrong receives. Single sends overlap with computation, so their memory must stay.
        batch_p2p_comm=not is_interleaved,
        overlap_p2p_comm=is_interleaved,
        batch_p2p_sync=on_gpu,
        variable_seq_lengths=False,
        deallocate_pipeline_outputs=not is_interleaved,
    )


def _resize_head(layer: Any, rows: int, tensor_size: int) -> None:
    # Megatron gives the head the embedding's rows; ours has none for the mask token.
    old = layer.weight
    weight = torch.nn.Parameter(old.new_empty(rows // tensor_size, old.shape[1]))
    weight.__dict__.update(old.__dict__)
    layer.weight = weight
