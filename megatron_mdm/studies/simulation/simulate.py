"""Plays ranks of a layout, one of each kind, and holds what they did against what was predicted."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from megatron_mdm.config import Config, check_layout
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.quiet import quiet_engines
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.model.head import CHUNK_BYTES
from megatron_mdm.model.memory import Dtype, estimate_stage_memory
from megatron_mdm.studies.costs.communication import step_transfers
from megatron_mdm.studies.simulation.calls import NUM_STEPS, PlayedRank
from megatron_mdm.studies.simulation.grid import Grid
from megatron_mdm.studies.simulation.replay import Fault, replay

# The one after which every step is alike.
_LAST_STEP = f"step {NUM_STEPS - 1}"


@dataclass(frozen=True)
class StageSimulation:
    """A pipeline stage, as its ranks played it.

    Attributes:
        stage: Its number.
        sent_bytes: Whole tensors of the collectives and messages of a step, by operation, without
            scalars: norms and checks for overflow.
        predicted_bytes: The same in closed form.
        memory_bytes: Most bytes that tensors held, from the making of the model on.
        predicted_memory_bytes: The estimate for a CPU, on which the ranks were played.
    """

    stage: int
    sent_bytes: dict[str, int]
    predicted_bytes: dict[str, float]
    memory_bytes: int
    predicted_memory_bytes: int


@dataclass(frozen=True)
class Simulation:
    """A layout that was played.

    Attributes:
        config: The run, its batch cut to micro batches that fill the pipeline twice.
        world_size: Ranks.
        played: The ranks that were played; others have their calls by likeness.
        num_calls: Of all ranks, of the start and two steps.
        faults: Ranks that wait for ever, or calls that do not agree; none where all is well.
        stages: What each stage sends and holds.
    """

    config: Config
    world_size: int
    played: list[int]
    num_calls: int
    faults: list[Fault]
    stages: list[StageSimulation]


def simulate(
    config: Config, world_size: int, dtype: Dtype, *, ranks: Sequence[int] = (), processes: int = 2
) -> Simulation:
    """Plays a layout.

    Args:
        config: A checked configuration.
        world_size: Ranks.
        dtype: Dtype of forward and backward.
        ranks: To play; none: one of each kind.
        processes: Ranks that are played at the same time, each in a process of its own.

    Returns:
        What came of it.

    Raises:
        ConfigError: Sizes do not divide, or the ranks leave a stage out.
    """
    config = _shorten(config, world_size)
    grid = Grid.of(config.parallel, check_layout(config, world_size))
    chosen = sorted(set(ranks) or set(grid.list_kinds()))
    _check_ranks(grid, chosen)
    played = play_ranks(config, chosen, world_size, dtype, processes)
    spread = grid.spread({rank: one.calls for rank, one in played.items()})
    return Simulation(
        config,
        world_size,
        chosen,
        sum(map(len, spread.values())),
        replay(spread),
        [
            _judge(config, stage, world_size, dtype, _list_ranks(grid, stage, played))
            for stage in range(grid.pp)
        ],
    )


def _shorten(config: Config, world_size: int) -> Config:
    """The run with micro batches that fill the pipeline twice; all later ones repeat these."""
    layout = check_layout(config, world_size)
    most = 2 * config.parallel.pipeline_model_parallel_size
    if layout.num_micro_batches <= most:
        return config
    size = most * layout.data_parallel_size * config.batch.micro_batch_size
    batch = config.batch.model_copy(update={"global_batch_size": size})
    return config.model_copy(update={"batch": batch})


def play_ranks(
    config: Config, ranks: Sequence[int], world_size: int, dtype: Dtype, processes: int = 2
) -> dict[int, PlayedRank]:
    """Plays ranks, each in a process of its own.

    Args:
        config: A checked configuration.
        ranks: Which.
        world_size: Ranks that they believe in.
        dtype: Dtype of forward and backward.
        processes: How many play at the same time.

    Returns:
        What each did.
    """
    quiet_engines(use_cpu=True)
    # Imported here, for it brings Megatron-Core and DeepSpeed.
    from megatron_mdm.studies.simulation.fake_rank import play_rank

    # A process that has played is of no use afterwards; what all of them import is loaded once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([play_rank.__module__])
    with (
        _warnings_off(),
        ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool,
    ):
        tasks = {rank: pool.submit(play_rank, config, rank, world_size, dtype) for rank in ranks}
        return {rank: task.result() for rank, task in tasks.items()}


@contextlib.contextmanager
def _warnings_off() -> Iterator[None]:
    """What engines warn of when they are imported, in the processes that are started meanwhile."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore"
    try:
        yield
    finally:
        del os.environ["PYTHONWARNINGS"]
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


def _check_ranks(grid: Grid, ranks: Sequence[int]) -> None:
    for rank in ranks:
        if not 0 <= rank < grid.size:
            raise ConfigError(f"--ranks={rank} is not one of {grid.size} ranks: count from 0.")
    stages = {grid.place_of(rank).pp for rank in ranks}
    for stage in range(grid.pp):
        if stage not in stages:
            first = grid.tp * grid.dp * stage
            raise ConfigError(
                f"--ranks leaves out pipeline stage {stage}: add one of its ranks, such as {first}."
            )


def _list_ranks(grid: Grid, stage: int, played: dict[int, PlayedRank]) -> list[PlayedRank]:
    return [one for rank, one in played.items() if grid.place_of(rank).pp == stage]


def _judge(
    config: Config, stage: int, world_size: int, dtype: Dtype, played: Sequence[PlayedRank]
) -> StageSimulation:
    sent = Counter[str]()
    for call in played[0].calls:
        if call.moment == _LAST_STEP and call.elements > 1 and call.operation != "receive":
            sent[call.operation] += call.total_bytes
    layout, seq_length = check_layout(config, world_size), config.data.seq_length
    tokens = layout.num_micro_batches * config.batch.micro_batch_size * seq_length
    mean_positions = build_objective(config).predicted_share(seq_length) * tokens
    predicted: dict[str, float] = {}
    for one in step_transfers(config, stage, world_size=world_size, dtype=dtype):
        # The prediction speaks of the mean over noise; the step drew its own.
        is_by_position = one.kind == "output layer" and one.operation == "all_reduce"
        share = played[0].num_positions / mean_positions if is_by_position else 1.0
        predicted[one.operation] = predicted.get(one.operation, 0.0) + one.total_bytes * share
    held = max(sum(kinds.values()) for one in played for kinds in one.memory.values())
    # A rank is played without hooks, and so without what they keep.
    config = config.model_copy(update={"hooks": []})
    estimate = estimate_stage_memory(
        config, stage, world_size=world_size, dtype=dtype, chunk_bytes=CHUNK_BYTES["cpu"]
    )
    return StageSimulation(stage, dict(sent), predicted, held, estimate.total_bytes)
