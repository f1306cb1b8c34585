"""What a rank sends in one optimizer step, by kind, in closed form.

Counted are the payloads of collectives, not the scalars of gradient norms and checks for
overflow, and not what Megatron and DeepSpeed exchange once at the start.

Symbols: d hidden size, S sequence length, B micro batch, m micro batches per replica, M positions
whose logits are computed, P parameters of a rank, V chunks of the model a pipeline stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_mdm.config import Config, Layout, check_layout
from megatron_mdm.diffusion.interpolation import NUM_TIME_FEATURES
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.model.memory import (
    ELEMENT_BYTES,
    LIVE_ELEMENTS,
    REDUCE_BUCKET_ELEMENTS,
    ROUND_ELEMENTS,
    Dtype,
    count_stage_parameters,
)
from megatron_mdm.model.parameters import list_parameters

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]
# `stage`: all ranks of a pipeline stage, replicas and tensor-parallel peers alike.
Group = Literal["tensor", "data", "pipeline", "stage"]
# DeepSpeed's `stage3_param_persistence_threshold`: smaller tensors are gathered once per step; and
# `stage3_prefetch_bucket_size`: about so many elements are gathered at once.
_PERSISTENT_ELEMENTS = 100_000
_PREFETCH_ELEMENTS = 50_000_000
_FP32_BYTES = 4


@dataclass(frozen=True)
class Transfer:
    """Equal collectives of a step.

    Attributes:
        kind: What is sent: `tensor parallel`, `output layer`, `pipeline`, `gradients`, `weights`,
            `tied embeddings`, or `optimizer`: pieces of what an update needs whole.
        operation: The collective, or a message to a neighbour.
        group: Over which ranks.
        num_ranks: Ranks of the group; 2 for a message.
        num_calls: How often a step, on average.
        call_bytes: Size of the whole tensor in one call: what is reduced, gathered or sent; of an
            `all_to_all` what a rank sends, itself included, on average over the ranks.
    """

    kind: str
    operation: Operation
    group: Group
    num_ranks: int
    num_calls: float
    call_bytes: float

    @property
    def total_bytes(self) -> float:
        """Size of the whole tensors of all calls."""
        return self.num_calls * self.call_bytes

    @property
    def sent_bytes(self) -> float:
        """What a rank sends in the ring algorithm.

        A ring of n ranks scatters and gathers in n - 1 rounds of a share 1 / n each, and reduces in
        twice as many.
        """
        if self.operation == "send":
            return self.total_bytes
        rounds = 2 if self.operation == "all_reduce" else 1
        return self.total_bytes * rounds * (self.num_ranks - 1) / self.num_ranks


def add_up_by_kind(
    transfers: Iterable[Transfer], amount: Callable[[Transfer], float]
) -> dict[str, float]:
    """Adds up an amount of transfers, such as bytes or seconds, of each kind."""
    sums: dict[str, float] = {}
    for one in transfers:
        sums[one.kind] = sums.get(one.kind, 0.0) + amount(one)
    return sums


def step_transfers(config: Config, stage: int, *, world_size: int, dtype: Dtype) -> list[Transfer]:
    """All that a rank of a pipeline stage takes part in during one step.

    Args:
        config: A checked configuration.
        stage: Pipeline stage.
        world_size: Number of ranks.
        dtype: Dtype of forward and backward.

    Returns:
        The transfers, none of them over a single rank.

    Raises:
        ConfigError: The sizes do not divide; see `check_layout`.
    """
    layout = check_layout(config, world_size)
    element = ELEMENT_BYTES[dtype]
    transfers = [
        *_tensor_parallel(config, stage, layout, element),
        *_pipeline(config, stage, layout, element),
        *_data_parallel(config, stage, layout, element),
        *_optimizer(config, stage, layout),
    ]
    return [one for one in transfers if one.num_ranks > 1 and one.total_bytes]


def _tensor_parallel(config: Config, stage: int, layout: Layout, element: int) -> list[Transfer]:
    model, parallel, m = config.model, config.parallel, layout.num_micro_batches
    tp, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layers = model.num_layers // stages
    tokens = config.batch.micro_batch_size * config.data.seq_length
    hidden = tokens * model.hidden_size * element
    again = 2 * layers if parallel.recompute == "full" else 0
    is_first, is_last = stage == 0, stage == stages - 1
    positions = build_objective(config).predicted_share(config.data.seq_length) * tokens

    def of(operation: Operation, calls: float, size: float, kind: str) -> Transfer:
        return Transfer(kind, operation, "tensor", tp, m * calls, size)

    transfers = []
    if parallel.sequence_parallel:
        # Each block gathers before and scatters after, forward and backward, and gathers its input
        # again for the gradient of its weights. The embedding scatters, the head gathers.
        transfers = [
            of("all_gather", 6 * layers + again + is_first, hidden, "tensor parallel"),
            of("reduce_scatter", 4 * layers + again + is_first, hidden, "tensor parallel"),
            of(
                "all_reduce",
                (2 + model.mlp_bias) * layers + is_last,
                model.hidden_size * element,
                "tensor parallel",
            ),
            of(
                "all_reduce",
                is_first and model.time_embedding,
                model.hidden_size * NUM_TIME_FEATURES * element,
                "tensor parallel",
            ),
            of("all_gather", is_last, hidden, "output layer"),
            of("reduce_scatter", is_last, hidden, "output layer"),
        ]
    else:
        # Two blocks a layer, each summed once forward and once backward; and the embedding.
        transfers = [
            of("all_reduce", 4 * layers + again + is_first, hidden, "tensor parallel"),
            of("all_reduce", is_last, positions * model.hidden_size * element, "output layer"),
        ]
    if model.qk_norm == "width":
        # A number of each token in fp32, of queries and of keys, forward and backward.
        transfers.append(of("all_reduce", 4 * layers + again, 4 * tokens, "tensor parallel"))
    elif model.qk_norm:
        transfers.append(
            of("all_reduce", 2 * layers, model.head_width * element, "tensor parallel")
        )
    head = config.objective.loss_head
    size = positions * head.num_reduced * 4 / head.num_reductions
    transfers.append(of("all_reduce", head.num_reductions * is_last, size, "output layer"))
    return transfers


def _pipeline(config: Config, stage: int, layout: Layout, element: int) -> list[Transfer]:
    model, parallel = config.model, config.parallel
    stages = parallel.pipeline_model_parallel_size
    if stages == 1:
        return []
    tp = parallel.tensor_model_parallel_size
    tokens = config.batch.micro_batch_size * config.data.seq_length
    split = tp if parallel.sequence_parallel else 1
    # Every chunk sends its output on and its input's gradient back, but for the model's two ends.
    ends = (stage == stages - 1) + (stage == 0)
    calls = layout.num_micro_batches * (2 * parallel.virtual_pipeline_model_parallel_size - ends)
    hidden = tokens * model.hidden_size * element / split
    transfers = [Transfer("pipeline", "send", "pipeline", 2, calls, hidden)]
    if model.tie_embeddings and stage in (0, stages - 1):
        size = model.embedding_rows * model.hidden_size * element / tp
        transfers.append(Transfer("tied embeddings", "all_reduce", "pipeline", 2, 1, size))
    return transfers


def _data_parallel(config: Config, stage: int, layout: Layout, element: int) -> list[Transfer]:
    zero = config.parallel.zero_stage
    ranks, m = layout.data_parallel_size, layout.num_micro_batches
    size = count_stage_parameters(config, stage)

    def of(
        kind: str, operation: Operation, times: int, elements: int, bucket_elements: int
    ) -> Transfer:
        calls = max(-(-elements // bucket_elements), 1)
        return Transfer(kind, operation, "data", ranks, times * calls, element * elements / calls)

    if zero == 3:
        persistent = _persistent_elements(config)
        others = size.total - persistent
        # So many weights stay from the forward to the backward pass, to half a percent.
        again = max(others - LIVE_ELEMENTS, 0)
        return [
            of("gradients", "reduce_scatter", m, size.total, REDUCE_BUCKET_ELEMENTS),
            of("weights", "all_gather", m, others, _PREFETCH_ELEMENTS),
            of("weights", "all_gather", m, again, _PREFETCH_ELEMENTS),
            of("weights", "all_gather", 1, persistent, _PREFETCH_ELEMENTS),
        ]
    # DeepSpeed's ZeRO-2 reduces in each micro batch, and as an all-reduce: see
    # `use_multi_rank_bucket_allreduce`. Under a pipeline all gradients wait for the end.
    each = zero == 2 and config.parallel.pipeline_model_parallel_size == 1
    gradients = of("gradients", "all_reduce", m if each else 1, size.total, REDUCE_BUCKET_ELEMENTS)
    if not zero:
        return [gradients]
    return [gradients, of("weights", "all_gather", 1, size.total, REDUCE_BUCKET_ELEMENTS)]


def _optimizer(config: Config, stage: int, layout: Layout) -> list[Transfer]:
    """Pieces of parameters to the rank that makes them whole for the update, and back."""
    size = count_stage_parameters(config, stage)
    held = sum(size.by_role[role] for role in config.optimizer.whole_roles)
    replicas = layout.data_parallel_size
    ranks = replicas * config.parallel.tensor_model_parallel_size
    calls = max(-(-held // (replicas * ROUND_ELEMENTS)), 1)
    # Without ZeRO every replica has all that it sends, and gets all of it back.
    back = held / replicas if config.parallel.zero_stage else held
    return [
        Transfer("optimizer", "all_to_all", "stage", ranks, calls, _FP32_BYTES * one / calls)
        for one in (held / replicas, back)
    ]


def _persistent_elements(config: Config) -> int:
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    persistent = 0
    for row in list_parameters(model):
        size = row.size(model) // (tp if row.split_dim is not None else 1)
        if size < _PERSISTENT_ELEMENTS:
            persistent += size * (model.num_layers if row.stage == "layers" else 1)
    return persistent
