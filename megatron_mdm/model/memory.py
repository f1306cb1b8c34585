"""What a rank holds at its fullest moment, part by part, in closed form.

Symbols: d hidden size, a = heads * head width, k = groups * head width, f inner width of the
feed-forward block, S sequence length, B micro batch, M positions whose logits are computed,
P parameters of a rank, R replicas.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass
from typing import Literal, NamedTuple

from megatron_mdm.config import Config, check_layout
from megatron_mdm.config.parameter_groups import ROLES, ParameterRole
from megatron_mdm.model.head import CHUNK_BYTES
from megatron_mdm.model.parameters import list_parameters

Dtype = Literal["fp32", "bf16"]
ELEMENT_BYTES: dict[Dtype, int] = {"fp32": 4, "bf16": 2}
_FP32_BYTES = 4
# Defaults of DeepSpeed 0.19, in elements. ZeRO allocates all of its `reduce_bucket_size`, so for a
# smaller model the engine asks for its size; `stage3_max_live_parameters` is left alone.
REDUCE_BUCKET_ELEMENTS = 500_000_000
LIVE_ELEMENTS = 1_000_000_000
# Of whole parameters that a rank holds at a time for an optimizer, unless one has more: 256 MiB.
ROUND_ELEMENTS = 2**26
# What it makes of a whole parameter on its way, in copies of it.
_WORKING_COPIES = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one rank by part, at the moment at which their sum is greatest.

    Attributes:
        weights_bytes: Weights in the dtype of the forward pass, gathered ones included.
        gradients_bytes: Gradients that exist at that moment.
        optimizer_bytes: The optimizer's fp32 states and the fp32 master weights.
        activations_bytes: What the forward passes in flight keep for their backward passes.
        logits_bytes: The output layer's chunk of logits, hidden states and gradients.
        buffers_bytes: DeepSpeed's reduction bucket, the copies of a reduction, and what the
            backward pass of one layer makes on its way.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    buffers_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of all parts."""
        return sum(astuple(self))


class StageSize(NamedTuple):
    """Parameters of one rank of a pipeline stage.

    Attributes:
        total: All of them.
        largest: Of the largest tensor.
        head: Of the output matrix, 0 where it is elsewhere.
        by_role: Of each role in the network.
    """

    total: int
    largest: int
    head: int
    by_role: dict[ParameterRole, int]


def count_stage_parameters(config: Config, stage: int) -> StageSize:
    """Parameters of one rank: matrices and biases split over TP, norms on every rank.

    Args:
        config: A checked configuration.
        stage: Pipeline stage.

    Returns:
        Its sizes.
    """
    model, parallel = config.model, config.parallel
    stages, tp = parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size
    held = {
        "first": int(stage == 0),
        "layers": model.num_layers // stages,
        "last": int(stage == stages - 1),
    }
    total = largest = head = 0
    by_role = dict.fromkeys(ROLES, 0)
    for row in list_parameters(model):
        size = row.size(model) // (tp if row.split_dim is not None else 1)
        total += held[row.stage] * size
        by_role[row.role] += held[row.stage] * size
        if len(row.shape(model)) > 1 and held[row.stage]:
            largest = max(largest, size)
    if stage == stages - 1:
        head = model.head_rows * model.hidden_size // tp
        if model.tie_embeddings and stages > 1:
            # A copy of the first stage's embedding.
            total, largest = total + head, max(largest, head)
            by_role["embedding"] += head
    return StageSize(total, largest, head, by_role)


def count_passes_in_flight(config: Config, stage: int, num_micro_batches: int) -> int:
    """Forward passes through chunks of the model whose backward passes are still to come.

    Args:
        config: A checked configuration.
        stage: Pipeline stage s of P, with V chunks.
        num_micro_batches: Micro batches m of a replica.

    Returns:
        At most, 1F1B: min(P - s, m). Interleaved: min(2 (P - s - 1) + (V - 1) P + 1, m V).

    Source:
        arXiv 2104.04473, section 2.2, and Megatron-Core's number of warm-up passes.
    """
    stages = config.parallel.pipeline_model_parallel_size
    chunks = config.parallel.virtual_pipeline_model_parallel_size
    if chunks == 1:
        return min(stages - stage, num_micro_batches)
    warm_up = 2 * (stages - stage - 1) + (chunks - 1) * stages
    return min(warm_up + 1, num_micro_batches * chunks)


def estimate_memory(
    config: Config, *, world_size: int, dtype: Dtype, chunk_bytes: int = CHUNK_BYTES["cuda"]
) -> MemoryEstimate:
    """Estimates the memory of the rank that needs most, without what an allocator wastes.

    The fullest of six moments counts: when the stage is built, the output layer, the begin and the
    end of the last backward pass, the reduction of gradients, and the update where that needs whole
    parameters.

    Args:
        config: A checked configuration.
        world_size: Number of ranks.
        dtype: Dtype of forward and backward.
        chunk_bytes: Most bytes of fp32 logits that the output layer holds; a GPU's unless given.

    Returns:
        The estimate of the pipeline stage with the greatest total.

    Raises:
        ConfigError: The sizes do not divide; see `check_layout`.
    """
    check_layout(config, world_size)
    estimates = [
        estimate_stage_memory(
            config, stage, world_size=world_size, dtype=dtype, chunk_bytes=chunk_bytes
        )
        for stage in range(config.parallel.pipeline_model_parallel_size)
    ]
    return max(estimates, key=lambda estimate: estimate.total_bytes)


def estimate_stage_memory(
    config: Config,
    stage: int,
    *,
    world_size: int,
    dtype: Dtype,
    chunk_bytes: int = CHUNK_BYTES["cuda"],
) -> MemoryEstimate:
    """Estimates the memory of a rank of one pipeline stage.

    Args:
        config: A checked configuration.
        stage: Pipeline stage.
        world_size: Number of ranks.
        dtype: Dtype of forward and backward.
        chunk_bytes: Most bytes of fp32 logits that the output layer holds.

    Returns:
        The parts at the fullest moment.
    """
    layout = check_layout(config, world_size)
    parallel, element = config.parallel, ELEMENT_BYTES[dtype]
    size = count_stage_parameters(config, stage)
    shard = -(-size.total // layout.data_parallel_size)
    weights = reduced_weights = element * size.total
    if parallel.zero_stage == 3 and layout.data_parallel_size > 1:
        weights = element * (shard + min(size.total, LIVE_ELEMENTS))
        # ZeRO-3 never releases norms, and the tensor used last is still there.
        reduced_weights = element * (shard + size.by_role["vector"] + size.largest)
    replicas = layout.data_parallel_size if parallel.zero_stage else 1
    # DeepSpeed's ZeRO keeps an fp32 copy of its partition even where the weights are fp32.
    kept = _count_states(config, size, replicas) + (shard if parallel.zero_stage else 0)
    # What hooks keep of every weight lies beside what the optimizer steps.
    num_hook_states = sum(len(section.list_weight_states()) for section in config.hooks)
    kept += num_hook_states * (shard if parallel.zero_stage else size.total)
    optimizer = _FP32_BYTES * kept
    tokens = config.batch.micro_batch_size * config.data.seq_length
    per_layer, working, boundary = (
        tokens * per_token for per_token in _bytes_per_token(config, element)
    )
    layers = config.model.num_layers // (
        parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size
    )
    in_flight = count_passes_in_flight(config, stage, layout.num_micro_batches)
    per_pass = layers * per_layer + boundary
    logits = _head_bytes(config, size.head, tokens, element, chunk_bytes)
    state = _estimate_gradient_state(config, size, shard, element, layout.num_micro_batches)
    at_head = element * size.head
    num_passes = layout.num_micro_batches * parallel.virtual_pipeline_model_parallel_size
    first = _estimate_gradient_state(config, size, shard, element, micro_batches=1).at_begin
    begins = [(in_flight * per_pass, state.at_begin)]
    if num_passes == in_flight > 1:
        # All of them are in flight only before the first backward pass has left gradients.
        begins = [(in_flight * per_pass, first), ((in_flight - 1) * per_pass, state.at_begin)]
    moments = [
        moment
        for activations, gradients in begins
        for moment in (
            (weights, gradients, activations, logits, state.bucket),
            (weights, gradients + at_head, activations, 0, state.backward_buffers + working),
        )
    ]
    moments += [
        (weights, state.at_end, per_layer, 0, state.backward_buffers + working),
        (reduced_weights, state.at_reduction, 0, 0, state.reduction_buffers),
    ]
    if config.optimizer.whole_roles:
        wholes = _FP32_BYTES * _count_update_elements(config, size, layout.data_parallel_size)
        moments.append((reduced_weights, state.at_update, 0, 0, state.bucket + wholes))
    estimates = [
        MemoryEstimate(held, gradients, optimizer, kept, head, buffers)
        for held, gradients, kept, head, buffers in moments
    ]
    # A stage is built whole in float32, before an engine casts and divides it.
    built = MemoryEstimate(_FP32_BYTES * size.total, 0, 0, 0, 0, 0)
    return max(built, *estimates, key=lambda estimate: estimate.total_bytes)


def _count_states(config: Config, size: StageSize, replicas: int) -> int:
    """Numbers that the optimizer keeps of the parameters of a rank, divided over replicas."""
    elements = Counter[int]()
    for role, count in size.by_role.items():
        elements[len(config.optimizer.list_state_names(role))] += count
    return sum(times * -(-count // replicas) for times, count in elements.items())


def _count_update_elements(config: Config, size: StageSize, replicas: int) -> int:
    """Numbers that an update holds besides all else, where it needs whole parameters."""
    model, roles = config.model, config.optimizer.whole_roles
    tp = config.parallel.tensor_model_parallel_size
    largest = max(row.size(model) for row in list_parameters(model) if row.role in roles)
    if replicas * tp == 1:
        return _WORKING_COPIES * largest
    held = sum(size.by_role[role] for role in roles)
    own = max(min(-(-held // replicas), ROUND_ELEMENTS), largest)
    # Without ZeRO every replica gets all of it back.
    moved = own if config.parallel.zero_stage else min(held, ROUND_ELEMENTS * replicas)
    # What is sent beside what is received; or parts beside a parameter that is put together.
    return max(2 * max(own, moved), own + (_WORKING_COPIES + (tp > 1)) * largest)


class _GradientState(NamedTuple):
    """Bytes of gradients and of what DeepSpeed reduces them with, in the last micro batch.

    Attributes:
        at_begin: Gradients when its backward pass begins.
        at_end: Gradients when it ends.
        at_reduction: Gradients while a bucket of them is reduced.
        at_update: Gradients while the optimizer steps.
        bucket: The bucket, if it is there during forward and backward passes.
        reduction_buffers: The bucket and the copies of it that a reduction makes.
        is_in_backward: Are buckets reduced while the backward pass goes on?
    """

    at_begin: int
    at_end: int
    at_reduction: int
    at_update: int
    bucket: int
    reduction_buffers: int
    is_in_backward: bool = False

    @property
    def backward_buffers(self) -> int:
        return self.reduction_buffers if self.is_in_backward else self.bucket


def _estimate_gradient_state(
    config: Config, size: StageSize, shard: int, element: int, micro_batches: int
) -> _GradientState:
    zero, whole = config.parallel.zero_stage, element * size.total
    pipelined = config.parallel.pipeline_model_parallel_size > 1
    before = whole if micro_batches > 1 else 0
    flat = min(size.total, REDUCE_BUCKET_ELEMENTS)
    bucket = element * flat * (2 if config.parallel.overlap_gradient_reduction else 1)
    is_bf16 = element != _FP32_BYTES
    overflows = size.total > REDUCE_BUCKET_ELEMENTS
    if zero == 0:
        return _GradientState(before, whole, whole, whole, 0, element * flat)
    parts = _FP32_BYTES * shard
    if zero == 3:
        # Flattened, and the pieces that come back.
        copies = bucket + 2 * element * flat
        return _GradientState(
            parts, parts, parts, 2 * parts, bucket, copies, is_in_backward=overflows
        )
    if zero == 1 and is_bf16 and not pipelined:
        # DeepSpeed's BF16_Optimizer holds whole fp32 gradients at all times, beside those of the
        # backward pass, and reduces a copy of them in both dtypes; it has no bucket.
        both = _FP32_BYTES * size.total
        copies = (_FP32_BYTES + element) * flat
        at_end = both + whole
        return _GradientState(both + before, at_end, at_end, at_end, 0, copies)
    # A full bucket holds the gradients themselves, and a flattened copy of it is reduced; in bf16
    # what comes of it is turned to fp32 a tensor at a time.
    copies = bucket + element * flat + (_FP32_BYTES * min(size.largest, shard) if is_bf16 else 0)
    left = element * (size.total - flat)
    if pipelined:
        # Gradients are whole until the last micro batch has passed, in fp32 if there are several;
        # only then is there a bucket.
        in_sums = _FP32_BYTES * size.total if micro_batches > 1 else whole
        before = in_sums if micro_batches > 1 else 0
        at_reduction = left + (parts if is_bf16 else 0)
        return _GradientState(before, in_sums, at_reduction, bucket + parts, 0, copies)
    if zero == 1:
        return _GradientState(before, whole, left, parts, bucket, copies)
    earlier = parts if micro_batches > 1 else 0
    at_reduction = parts if is_bf16 else earlier
    return _GradientState(
        earlier, earlier, at_reduction, parts, bucket, copies, is_in_backward=overflows
    )


def _bytes_per_token(config: Config, element: int) -> tuple[int, int, int]:
    """Bytes that a layer keeps, that its backward pass adds, and that a chunk keeps besides.

    Both norms keep their inputs and outputs (4 d, split over TP only with sequence parallelism).
    Attention keeps the rotated queries and keys, values, its output and a transposed copy of that
    (3 a + 2 k), and one fp32 log-sum per head, but no S x S matrix; a sink its output before it (a)
    and three numbers per head. SwiGLU keeps its inputs and its output (3 f), a squared ReLU 2 f.
    Norms of heads keep the product that they act on (a + 2 k) and one fp32 root per head; those
    over the whole width a copy of queries and keys; other norms one root. Dropout on hidden states
    keeps two boolean masks.
    """
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_model_parallel_size
    residual = tp if parallel.sequence_parallel else 1
    heads, groups, d = model.num_attention_heads, model.query_groups, model.hidden_size
    a, k, f = heads * model.head_width, groups * model.head_width, model.ffn_hidden_size
    # Of the activation: its inputs and their gradients.
    inner = 2 * f if model.mlp == "swiglu" else f
    split, num_floats, num_roots = 3 * a + 2 * k + inner + f, heads, 2
    if model.qk_norm == "width":
        split, num_roots = split + a + k, num_roots + 2
    elif model.qk_norm:
        split, num_floats = split + a + 2 * k, num_floats + heads + groups
    if model.attention_sink:
        split, num_floats = split + a, num_floats + 3 * heads
    masks = 2 * d // residual if model.hidden_dropout else 0
    floats = _FP32_BYTES * (num_floats // tp + num_roots) + masks
    whole = element * (4 * d // residual + split // tp) + floats
    # The gradients of SwiGLU's inputs and output and its gate again, but no longer its output; the
    # gradients of the residual and of the block's output.
    working = element * (2 * d // residual + (2 * inner - f) // tp)
    if parallel.sequence_parallel:
        working += element * 2 * d
    boundary = 0
    if parallel.pipeline_model_parallel_size > 1:
        # The message with a gradient and, where it is not freed at once, the output itself.
        working += element * 2 * d // residual
        boundary = (
            element * d // residual if parallel.virtual_pipeline_model_parallel_size > 1 else 0
        )
    if parallel.recompute == "full":
        kept = element * d // residual + masks
        return kept, working + whole - kept, boundary
    if parallel.recompute == "selective":
        less = element * (2 * d // residual + f // tp)
        return whole - less, working + element * f // tp, boundary
    return whole, working, boundary


def _head_bytes(
    config: Config, head_elements: int, tokens: int, element: int, chunk_bytes: int
) -> int:
    if not head_elements:
        return 0
    d, tp = config.model.hidden_size, config.parallel.tensor_model_parallel_size
    rows = config.model.head_rows // tp
    # All positions of a micro batch, since some draw of t masks nearly all of them.
    chunk_rows = min(max(chunk_bytes // (_FP32_BYTES * rows), 1), tokens)
    logits = _FP32_BYTES if element == _FP32_BYTES else _FP32_BYTES + element
    # The last norm's output (its input is the last layer's), whole where the sequence was split,
    # the positions that count and their gradient; an fp32 gradient of the output matrix.
    hidden = (4 if config.parallel.sequence_parallel else 3) * tokens * d * element
    return hidden + chunk_rows * rows * logits + _FP32_BYTES * head_elements
