"""What a run costs: parameters, FLOPs, optimizer steps and a rank's memory, all in closed form.

Symbols: d hidden size, L layers, a = heads * head width, k = groups * head width, f inner width of
the feed-forward block, V vocabulary, S sequence length, B global batch.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from fractions import Fraction
from typing import Literal

from megatron_mdm.config import Config, ModelConfig, ObjectiveConfig, check_layout
from megatron_mdm.errors import ConfigError

_FP32_BYTES = 4
_BF16_BYTES = 2


@dataclass(frozen=True)
class ParameterCount:
    """Trainable numbers of a model.

    Attributes:
        non_embedding: Transformer layers and final norm: the N of scaling laws.
        embedding: Input embedding: V + 1 rows, the last one for the mask token; V rows if the mask
            token is one of the vocabulary.
        head: Output head: V rows; 0 when it shares the embedding's weights.
        padding: Rows added to embedding and head so that they divide over ranks; never trained.
    """

    non_embedding: int
    embedding: int
    head: int
    padding: int

    @property
    def total(self) -> int:
        """Parameters that matter: all but the padding."""
        return self.non_embedding + self.embedding + self.head

    @property
    def padded_total(self) -> int:
        """Parameters that are allocated."""
        return self.total + self.padding


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Counts the parameters of a model.

    Args:
        model: Shape of the transformer.

    Returns:
        The count by part. For as many groups as heads of width d / heads, without biases and norms
        of heads, `non_embedding` = L (4 d^2 + 3 d f + 2 d) + d.

    Source:
        arXiv 2410.18514, appendix; 169,897,728 for smdm-170M.
    """
    d = model.hidden_size
    layer = _layer_matmul_parameters(model) + _layer_biases(model) + _layer_norms(model)
    head = 0 if model.tie_embeddings else model.vocab_size * d
    rows = model.embedding_rows + (0 if model.tie_embeddings else model.head_rows)
    embedding = max(model.vocab_size, model.mask_id + 1) * d
    return ParameterCount(
        non_embedding=model.num_layers * layer + d,
        embedding=embedding,
        head=head,
        padding=rows * d - embedding - head,
    )


def mean_length(objective: ObjectiveConfig, seq_length: int) -> float:
    """Expected tokens of a sample that count under stochastic sequence length.

    Args:
        objective: Gives the share r of samples that are cut, and the kind.
        seq_length: Tokens of a full window, S.

    Returns:
        (1 - r) S + r (m + S) / 2, where m is the shortest length: 1, or 2 for AR.

    Source:
        arXiv 2410.18514: 2048 (1 - r) + 1024.5 r.
    """
    ratio = objective.stochastic_length_ratio
    shortest = 2 if objective.kind == "ar" else 1
    return seq_length * (1 - ratio) + ratio * (shortest + seq_length) / 2


def head_share(objective: ObjectiveConfig, seq_length: int) -> float:
    """Expected share of a full window's positions whose logits the loss needs.

    Args:
        objective: Kind and masking.
        seq_length: Tokens of a window, S.

    Returns:
        With M the mean length of a sample, S unless samples are cut: AR: (M - 1) / S. Fixed-count
        masking: (M + 1) / (2 S), for l ~ U{1..L}. Bernoulli masking: (1 + eps) / 2 * M / S, where
        (1 + eps) / 2 is the mean of p = (1 - eps) t + eps.
    """
    length = mean_length(objective, seq_length)
    if objective.kind == "ar":
        return (length - 1) / seq_length
    if objective.masking == "fixed_count":
        return (length + 1) / (2 * seq_length)
    return (1 + objective.eps) / 2 * length / seq_length


def six_nd_flops(model: ModelConfig, num_tokens: float) -> float:
    """Training compute by the rule of scaling laws, C = 6 N D.

    Args:
        model: Its non-embedding parameters are N.
        num_tokens: Training tokens, D.

    Returns:
        FLOPs.

    Source:
        arXiv 2001.08361, section 2.1.
    """
    return 6.0 * count_parameters(model).non_embedding * num_tokens


def training_flops_per_token(
    model: ModelConfig, seq_length: int, *, causal: bool, head_share: float
) -> float:
    """FLOPs of all matrix products, forward and backward, per token of a full window.

    A product costs 2 FLOPs per multiply-add, and its backward pass twice its forward pass, so:

    - linear layers: 6 L (2 d a + 2 d k + 3 d f);
    - attention scores and values: 12 L S a, half of it when causal;
    - head: 6 d rows share, over the padded rows that are really multiplied.

    Norms, biases, activations, rotary embeddings and the embedding look-up are not counted.

    Args:
        model: Shape of the transformer.
        seq_length: Tokens of a window, S.
        causal: Each token attends to those before it only.
        head_share: Share of positions whose logits are computed, in [0, 1]; see `head_share`.

    Returns:
        FLOPs per token.
    """
    width = model.num_attention_heads * model.head_width
    linear = 6 * model.num_layers * _layer_matmul_parameters(model)
    attention = 12 * model.num_layers * seq_length * width * (0.5 if causal else 1.0)
    return linear + attention + 6 * model.hidden_size * model.head_rows * head_share


def training_steps(config: Config, num_windows: int, stated_samples: Fraction | None = None) -> int:
    """Optimizer steps of a run, from whichever length `schedule` gives.

    Args:
        config: A checked configuration.
        num_windows: Windows of all sources together.
        stated_samples: Samples that follow from the epochs of the sources, where `schedule` leaves
            the length to them.

    Returns:
        steps: as given. tokens: the fewest steps whose expected tokens, at `mean_length` tokens a
        sample, reach it. epochs: the fewest steps that show epochs * num_windows samples, taking
        the decimal fraction at its word; so too for `stated_samples`. flops: C / (6 N B M) with M
        the mean length, rounded down, so that the budget is not exceeded.

    Raises:
        ConfigError: The FLOP budget does not pay for one step.

    Source:
        arXiv 2410.18514, public code; 18,710 steps for smdm-170M at 1e19.
    """
    schedule, batch_size = config.schedule, config.batch.global_batch_size
    if schedule.steps is not None:
        return schedule.steps
    tokens_per_step = batch_size * mean_length(config.objective, config.data.seq_length)
    if schedule.tokens is not None:
        return math.ceil(schedule.tokens / Fraction(tokens_per_step))
    if schedule.epochs is not None:
        # Fraction of the text: 0.1 of 30 windows is 3 samples, not one more by a rounding error.
        return math.ceil(Fraction(str(schedule.epochs)) * num_windows / batch_size)
    if schedule.flops is None:
        if stated_samples is None:
            raise ValueError("a run without a length in schedule needs its sources' samples")
        return math.ceil(stated_samples / batch_size)
    budget = schedule.flops
    flops_per_step = six_nd_flops(config.model, tokens_per_step)
    steps = int(budget / flops_per_step)
    if steps < 1:
        raise ConfigError(
            f"schedule.flops={budget:.3g} does not pay for one step of "
            f"batch.global_batch_size={batch_size}, which takes {flops_per_step:.3g} FLOPs: raise "
            "the budget or choose a smaller model or batch."
        )
    return steps


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of one rank by part. An estimate for planning, not a measurement.

    Attributes:
        weights_bytes: Weights in the dtype of the forward pass.
        gradients_bytes: Gradients that live until the optimizer step.
        optimizer_bytes: AdamW's two fp32 moments and the fp32 master weights.
        activations_bytes: What the forward passes in flight keep for their backward passes.
        logits_bytes: Logits, their fp32 softmax and their gradient, for one micro batch.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of all parts."""
        return sum(astuple(self))


def estimate_memory(
    config: Config, *, world_size: int, dtype: Literal["fp32", "bf16"]
) -> MemoryEstimate:
    """Estimates the memory of the rank that needs most, without allocator waste or buffers.

    Weights are divided by TP and PP, and by the data-parallel size R under ZeRO-3; optimizer state
    by R from ZeRO-1 on; gradients by R from ZeRO-2 on, unless a pipeline keeps them whole until its
    last micro batch. Activations: see `_activation_elements`; with the 1F1B schedule stage s
    of P keeps min(P - s, micro batches) at a time. Logits: all S positions of a micro batch, since
    some draw of t masks nearly all of them.

    Args:
        config: A checked configuration.
        world_size: Number of ranks.
        dtype: Dtype of forward and backward.

    Returns:
        The estimate of the pipeline stage with the greatest total.

    Raises:
        ConfigError: The sizes do not divide; see `check_layout`.
    """
    layout = check_layout(config, world_size)
    stages = config.parallel.pipeline_model_parallel_size
    estimates = [
        _estimate_stage(
            config,
            stage,
            element_bytes=_BF16_BYTES if dtype == "bf16" else _FP32_BYTES,
            data_parallel_size=layout.data_parallel_size,
            num_in_flight=min(stages - stage, layout.num_micro_batches),
        )
        for stage in range(stages)
    ]
    return max(estimates, key=lambda estimate: estimate.total_bytes)


def _estimate_stage(
    config: Config, stage: int, *, element_bytes: int, data_parallel_size: int, num_in_flight: int
) -> MemoryEstimate:
    model, parallel = config.model, config.parallel
    zero, stages = parallel.zero_stage, parallel.pipeline_model_parallel_size
    parameters = _stage_parameters(config, stage)
    shard = -(-parameters // data_parallel_size)
    gradients = shard if zero == 3 or (zero == 2 and stages == 1) else parameters
    # DeepSpeed's ZeRO keeps an fp32 copy of its partition even where the weights are fp32.
    has_master = element_bytes != _FP32_BYTES or zero >= 1
    state_bytes = _FP32_BYTES * (3 if has_master else 2)
    tokens = config.batch.micro_batch_size * config.data.seq_length
    is_last = stage == stages - 1
    layers = model.num_layers // stages
    elements, other_bytes = _activation_elements(config)
    final_norm = 2 * model.hidden_size if is_last else 0
    logits = tokens * model.head_rows // parallel.tensor_model_parallel_size if is_last else 0
    return MemoryEstimate(
        weights_bytes=element_bytes * (shard if zero == 3 else parameters),
        gradients_bytes=element_bytes * gradients,
        optimizer_bytes=state_bytes * (shard if zero >= 1 else parameters),
        activations_bytes=num_in_flight
        * tokens
        * (layers * (elements * element_bytes + other_bytes) + final_norm * element_bytes),
        logits_bytes=logits * (2 * element_bytes + _FP32_BYTES),
    )


def _stage_parameters(config: Config, stage: int) -> int:
    """Parameters of one rank of a stage: matrices and biases split over TP, norms on every rank."""
    model, parallel = config.model, config.parallel
    stages, d = parallel.pipeline_model_parallel_size, model.hidden_size
    layers = model.num_layers // stages
    split = layers * (_layer_matmul_parameters(model) + _layer_biases(model))
    norms = layers * _layer_norms(model)
    if stage == 0:
        split += model.embedding_rows * d
    if stage == stages - 1:
        norms += d
        # Tied weights are one matrix on one stage and two on two.
        if not model.tie_embeddings or stages > 1:
            split += model.head_rows * d
    return split // parallel.tensor_model_parallel_size + norms


def _activation_elements(config: Config) -> tuple[int, int]:
    """What a layer keeps per token: elements of the compute dtype, and bytes of other types.

    Both norms keep input and output (4 d, split over TP only with sequence parallelism). Attention
    keeps q, k, v and its output (2 a + 2 k), and one fp32 log-sum a head, but no S x S matrix;
    SwiGLU keeps gate, value, silu(gate) and their product (4 f). Dropout on hidden states keeps
    two boolean masks; dropout on attention weights is drawn again in the backward pass. Norms of
    heads keep q and k from before them as well (a + k), and one fp32 root a head.
    """
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_model_parallel_size
    residual_split = tp if parallel.sequence_parallel else 1
    heads, groups = model.num_attention_heads, model.query_groups
    attention = 2 * (heads + groups) * model.head_width
    elements = (
        4 * model.hidden_size // residual_split + (attention + 4 * model.ffn_hidden_size) // tp
    )
    num_floats = heads
    if model.qk_norm:
        elements += (heads + groups) * model.head_width // tp
        num_floats += heads + groups
    dropout_masks = 2 * model.hidden_size // residual_split if model.hidden_dropout else 0
    return elements, _FP32_BYTES * num_floats // tp + dropout_masks


def _layer_matmul_parameters(model: ModelConfig) -> int:
    """Query, key, value and output projections, and the three matrices of SwiGLU."""
    d, heads, groups = model.hidden_size, model.num_attention_heads, model.query_groups
    return 2 * d * (heads + groups) * model.head_width + 3 * d * model.ffn_hidden_size


def _layer_biases(model: ModelConfig) -> int:
    """Biases of queries, keys and values."""
    heads = model.num_attention_heads + 2 * model.query_groups
    return heads * model.head_width if model.qkv_bias else 0


def _layer_norms(model: ModelConfig) -> int:
    """Both norms of a layer, and those of its heads' queries and keys."""
    return 2 * model.hidden_size + (2 * model.head_width if model.qk_norm else 0)
