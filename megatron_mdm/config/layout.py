"""Do the sizes fit the number of ranks? Checked before a process group exists."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_mdm.config.loading import parse_section
from megatron_mdm.config.model import ModelConfig
from megatron_mdm.config.schema import Config, ParallelConfig
from megatron_mdm.core.errors import ConfigError, join_problems, note_problem


@dataclass(frozen=True)
class Layout:
    """How ranks are divided.

    Attributes:
        world_size: Ranks in all.
        data_parallel_size: Replicas of the model.
        num_micro_batches: Micro batches per rank and optimizer step.
    """

    world_size: int
    data_parallel_size: int
    num_micro_batches: int


def check_layout(config: Config, world_size: int) -> Layout:
    """Checks that model, batch and ranks divide, and names the sizes that would.

    Args:
        config: A checked configuration.
        world_size: Number of ranks that the launcher started.

    Returns:
        The layout.

    Raises:
        ConfigError: Some size does not divide, or a combination does not work; all such problems.
    """
    problems: list[str] = []
    layout = None
    with note_problem(problems):
        check_model_splits(config.model, config.parallel, config.data.seq_length)
    with note_problem(problems):
        layout = _divide_ranks(config, world_size)
    if layout is None or problems:
        raise ConfigError(join_problems(problems))
    return layout


def _divide_ranks(config: Config, world_size: int) -> Layout:
    parallel, batch = config.parallel, config.batch
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if world_size % model_ranks:
        raise ConfigError(
            f"parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size} times "
            f"parallel.pipeline_model_parallel_size={parallel.pipeline_model_parallel_size} "
            f"does not divide the {world_size} processes that were launched: launch a multiple "
            f"of {model_ranks}, for example torchrun --nproc_per_node={model_ranks}."
        )
    data_parallel_size = world_size // model_ranks
    samples = batch.micro_batch_size * data_parallel_size
    if batch.global_batch_size % samples:
        choices = _format_multiples(batch.global_batch_size, samples)
        raise ConfigError(
            f"batch.global_batch_size={batch.global_batch_size} is not a multiple of "
            f"batch.micro_batch_size={batch.micro_batch_size} times {data_parallel_size} "
            f"data-parallel ranks: use {choices}."
        )
    num_micro_batches = batch.global_batch_size // samples
    stages = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size > 1 and num_micro_batches % stages:
        choices = _format_multiples(batch.global_batch_size, samples * stages)
        raise ConfigError(
            f"batch.global_batch_size={batch.global_batch_size} makes {num_micro_batches} micro "
            f"batches per replica, but parallel.virtual_pipeline_model_parallel_size="
            f"{parallel.virtual_pipeline_model_parallel_size} needs a multiple of "
            f"parallel.pipeline_model_parallel_size={stages}: use {choices}."
        )
    return Layout(world_size, data_parallel_size, num_micro_batches)


def divide_model(tensor_parallel_size: int, pipeline_parallel_size: int) -> ParallelConfig:
    """Makes the section `parallel` of a model that is not trained: ranks and stages alone.

    Raises:
        ConfigError: A size is not valid.
    """
    sizes = {
        "tensor_model_parallel_size": tensor_parallel_size,
        "pipeline_model_parallel_size": pipeline_parallel_size,
    }
    return parse_section(ParallelConfig, sizes, "parallel")


def check_model_splits(model: ModelConfig, parallel: ParallelConfig, seq_length: int) -> None:
    """Checks that a model can be divided over so many ranks and stages.

    Raises:
        ConfigError: Some size does not divide, or a combination does not work.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    by_ranks, by_stages = (
        f"parallel.{name}_model_parallel_size" for name in ("tensor", "pipeline")
    )
    problems: list[str] = []
    wholes = {
        "model.num_attention_heads": (by_ranks, tp, model.num_attention_heads),
        "model.num_query_groups": (by_ranks, tp, model.query_groups),
        "model.ffn_hidden_size": (by_ranks, tp, model.ffn_hidden_size),
        "model.num_layers": (by_stages, pp, model.num_layers),
    }
    if model.num_query_groups is None:
        # As many as heads.
        del wholes["model.num_query_groups"]
    for field, (parts, count, size) in wholes.items():
        with note_problem(problems):
            _check_divides(parts, count, field, size)
    with note_problem(problems):
        _check_padding(model.vocab_padding_multiple, tp)
    if model.num_layers % pp == 0:
        with note_problem(problems):
            _check_interleaving(parallel, model.num_layers)
    if parallel.zero_stage == 3 and pp > 1:
        problems.append(
            f"parallel.zero_stage=3 does not work with parallel.pipeline_model_parallel_size={pp}: "
            "use zero_stage 0, 1 or 2, or one pipeline stage."
        )
    with note_problem(problems):
        _check_overlap(parallel)
    with note_problem(problems):
        _check_sequence_parallel(parallel, seq_length)
    if problems:
        raise ConfigError(join_problems(problems))


def _check_padding(padding: int, tp: int) -> None:
    if padding % tp:
        raise ConfigError(
            f"parallel.tensor_model_parallel_size={tp} does not divide "
            f"model.vocab_padding_multiple={padding}: set that to a multiple of {tp}, "
            f"for example {math.lcm(padding, tp)}."
        )


def _check_sequence_parallel(parallel: ParallelConfig, seq_length: int) -> None:
    tp = parallel.tensor_model_parallel_size
    if not parallel.sequence_parallel:
        return
    if tp == 1:
        raise ConfigError(
            "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size of at "
            "least 2, but it is 1: raise it or switch sequence_parallel off."
        )
    _check_divides("parallel.tensor_model_parallel_size", tp, "data.seq_length", seq_length)


def _check_overlap(parallel: ParallelConfig) -> None:
    if parallel.overlap_gradient_reduction and (
        parallel.zero_stage not in (1, 2) or parallel.pipeline_model_parallel_size > 1
    ):
        raise ConfigError(
            "parallel.overlap_gradient_reduction=true is for parallel.zero_stage 1 and 2 without "
            f"pipeline stages, but they are {parallel.zero_stage} and "
            f"{parallel.pipeline_model_parallel_size}: leave it out, as ZeRO-3 overlaps by itself "
            "and the others reduce once per step."
        )


def _check_interleaving(parallel: ParallelConfig, num_layers: int) -> None:
    pp, chunks = (
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
    )
    if chunks == 1:
        return
    if pp == 1:
        raise ConfigError(
            f"parallel.virtual_pipeline_model_parallel_size={chunks} needs "
            "parallel.pipeline_model_parallel_size of at least 2, but it is 1: raise that or set "
            "virtual_pipeline_model_parallel_size to 1."
        )
    _check_divides(
        "parallel.virtual_pipeline_model_parallel_size",
        chunks,
        "model.num_layers / parallel.pipeline_model_parallel_size",
        num_layers // pp,
    )


def _format_multiples(size: int, unit: int) -> str:
    below = size // unit * unit
    return " or ".join(str(multiple) for multiple in (below, below + unit) if multiple)


def _check_divides(field: str, value: int, whole_field: str, whole: int) -> None:
    if whole % value:
        divisors = [str(size) for size in range(1, whole + 1) if whole % size == 0][:8]
        choices = ", ".join(divisors[:-1]) + " or " + divisors[-1] if divisors[1:] else divisors[0]
        raise ConfigError(f"{field}={value} does not divide {whole_field}={whole}: use {choices}.")
