"""What ranks do in these tests: build a tiny run from plain values, and report plain values."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from weight_pieces import Piece, piece_of

from megatron_mdm.checkpoint.whole_weights import gather_weights
from megatron_mdm.config import Config, check_layout, parse_config
from megatron_mdm.data.loader import TrainingBatches
from megatron_mdm.data.mixture import SampleOrder
from megatron_mdm.data.order import DocumentKey
from megatron_mdm.data.windows import WindowReader, number_documents
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.diffusion.samples import TextWindow
from megatron_mdm.diffusion.stochastic_depth import build_stochastic_depth
from megatron_mdm.distributed.mesh import Mesh, open_mesh
from megatron_mdm.distributed.processes import (
    read_world_size,
    resolve_device,
    start_process_group,
)
from megatron_mdm.model.initialization import draw_initial_weight
from megatron_mdm.model.shards import name_shards
from megatron_mdm.model.transformer import DiffusionTransformer, build_model
from megatron_mdm.training.engine import Engine

Overrides = dict[str, Any]

NUM_WINDOWS = 12

# The objects of the imported libraries stay; collecting after a case need not walk through them.
gc.collect()
gc.freeze()

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BASE: dict[str, dict[str, Any]] = {
    "run": {"dir": "unused", "seed": 1, "device": "cpu"},
    "model": {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "vocab_size": 61,
        "vocab_padding_multiple": 8,
    },
    "objective": {"kind": "mdm", "process": {"masking": "fixed_count"}},
    "data": {"train": [{"path": "unused"}], "seq_length": 16},
    # Four micro batches per step in one process, one with four replicas.
    "batch": {"micro_batch_size": 2, "global_batch_size": 8},
    "parallel": {"zero_stage": 0},
    "optimizer": {"lr": 3e-3, "clip_grad": 0.5},
    "schedule": {"steps": 6},
    "finetuning": {},
}


def config_of(overrides: Overrides) -> Config:
    """A tiny run.

    Args:
        overrides: Dotted keys and their values, in place of the defaults of this module.

    Returns:
        The checked configuration.
    """
    tree = {section: dict(fields) for section, fields in _BASE.items()}
    for key, value in overrides.items():
        *sections, field = key.split(".")
        fields: dict[str, Any] = tree
        for section in sections:
            # A copy: the base stays as it is.
            fields[section] = dict(fields.get(section, {}))
            fields = fields[section]
        fields[field] = value
    return parse_config(tree)


class TokenWindows:
    """Windows of random tokens in memory, without the mask token.

    With document attention every fifth token or so ends a document.

    Args:
        config: The run.
    """

    num_windows = NUM_WINDOWS
    eod_token_id = 0

    def __init__(self, config: Config) -> None:
        self.seq_length = config.data.seq_length
        tokens = np.arange(config.model.vocab_size)
        tokens = tokens[tokens != config.model.mask_id]
        generator = np.random.default_rng(5)
        self._tokens = generator.choice(tokens, (self.num_windows, self.seq_length))
        self._by_document = config.data.attention == "document"
        if self._by_document:
            ends = generator.random(self._tokens.shape) < 0.2
            self._tokens[ends] = self.eod_token_id

    def read_window(
        self, window: int, shift: int = 0, document_key: DocumentKey | None = None
    ) -> TextWindow:
        """Reads a window.

        Args:
            window: Index.
            shift: Always 0 in these orders.
            document_key: Always None.

        Returns:
            Tokens, with their documents if attention is by document.
        """
        tokens_S = self._tokens[window].copy()
        if not self._by_document:
            return TextWindow(tokens_S)
        return TextWindow(tokens_S, number_documents(tokens_S, self.eod_token_id))


def batches_of(config: Config, data_rank: int, data_size: int) -> TrainingBatches:
    """The micro batches of a replica, by the product's own partition.

    Args:
        config: The run.
        data_rank: Replica.
        data_size: Replicas.

    Returns:
        Micro batches of any step.
    """
    source: WindowReader = TokenWindows(config)
    if config.finetuning.enabled:
        # Imported here, for it imports this module.
        from packed_pairs import PairWindows

        source = PairWindows(config)
    order = SampleOrder(
        [1],
        [source.num_windows],
        seq_length=config.data.seq_length,
        kind=config.data.order,
        seed=config.run.seed,
    )
    objective = build_objective(config)
    return TrainingBatches(
        [source],
        order,
        objective,
        global_batch_size=config.batch.global_batch_size,
        micro_batch_size=config.batch.micro_batch_size,
        data_parallel_rank=data_rank,
        data_parallel_size=data_size,
        draw_inputs=build_stochastic_depth(config),
    )


class Stage(NamedTuple):
    """A rank's part of a run before DeepSpeed takes hold of it."""

    config: Config
    mesh: Mesh
    model: DiffusionTransformer


@contextlib.contextmanager
def stage_of(overrides: Overrides, dtype: str = "fp32") -> Iterator[Stage]:
    """Builds this rank's model, and removes the groups afterwards.

    Args:
        overrides: As for `config_of`.
        dtype: `fp32` or `bf16`.

    Yields:
        The stage.
    """
    config = config_of(overrides)
    check_layout(config, read_world_size())
    device = resolve_device("cpu")
    start_process_group(device)
    with open_mesh(config.parallel, device) as mesh:
        yield Stage(config, mesh, build_model(config, mesh, _DTYPES[dtype]))


@contextlib.contextmanager
def engine_of(stage: Stage, dtype: str = "fp32") -> Iterator[Engine]:
    """Gives a stage to an engine, and removes its hooks afterwards.

    Args:
        stage: A stage that no engine has had.
        dtype: `fp32` or `bf16`.

    Yields:
        The engine.
    """
    layout = check_layout(stage.config, read_world_size())
    engine = Engine(stage.config, layout, stage.mesh, stage.model, _DTYPES[dtype])
    yield engine
    engine.deepspeed.destroy()
    del engine
    gc.collect()


def mean_loss(engine: Engine, loss_sum: torch.Tensor, global_batch_size: int) -> float:
    """The loss of a step over the global batch.

    Args:
        engine: The engine that made it.
        loss_sum: This rank's sum.
        global_batch_size: Samples a step.

    Returns:
        Nats per token, the same on every rank.
    """
    total = loss_sum.clone()
    dist.all_reduce(total)
    return total.item() / global_batch_size


def train(
    overrides: Overrides, num_steps: int = 5, lr: float | None = None, dtype: str = "fp32"
) -> dict[str, list[float]]:
    """Trains, then evaluates.

    Args:
        overrides: As for `config_of`.
        num_steps: Optimizer steps.
        lr: Learning rate; None: the config's.
        dtype: `fp32` or `bf16`.

    Returns:
        The loss (nats per token) and gradient norm of every step, and the held-out loss after them.
    """
    losses, norms = [], []
    with stage_of(overrides, dtype) as stage, engine_of(stage, dtype) as engine:
        batches = batches_of(stage.config, stage.mesh.dp.rank, stage.mesh.dp.size)
        for step in range(num_steps):
            rate = stage.config.optimizer.lr if lr is None else lr
            result = engine.train_step(step, batches.read_step(step), rate)
            size = stage.config.batch.global_batch_size
            losses.append(mean_loss(engine, result.loss_sum, size))
            norms.append(result.grad_norm)
        held_out = evaluate(stage, engine)
    return {"losses": losses, "grad_norms": norms, "held_out": [held_out]}


def assert_same_run(
    found: dict[str, list[float]], expected: dict[str, list[float]], *, rtol: float
) -> None:
    """Asserts that two runs of `train` lost and moved alike at every step.

    Args:
        found: What `train` returned.
        expected: What it should have.
        rtol: Relative tolerance of each number.
    """
    assert found.keys() == expected.keys()
    for kind, values in expected.items():
        np.testing.assert_allclose(found[kind], values, rtol=rtol, err_msg=kind)


def evaluate_untrained(overrides: Overrides) -> float:
    """Evaluates initial weights.

    Args:
        overrides: As for `config_of`.

    Returns:
        Nats per token.
    """
    with stage_of(overrides) as stage, engine_of(stage) as engine:
        return evaluate(stage, engine)


def evaluate(stage: Stage, engine: Engine) -> float:
    """The loss on samples that no step trains on.

    Args:
        stage: The stage.
        engine: Its engine.

    Returns:
        Nats per token, the same on every rank.
    """
    mesh = stage.mesh
    total = torch.zeros((), dtype=torch.float64)
    batches = batches_of(stage.config, mesh.dp.rank, mesh.dp.size)
    for batch in batches.read_step(1000):
        losses_B = engine.evaluate(batch)
        if losses_B is not None and mesh.reports_loss:
            total += losses_B.sum()
    return mean_loss(engine, total, stage.config.batch.global_batch_size)


def initial_pieces(overrides: Overrides, with_engine: bool = False) -> list[Piece]:
    """A rank's initial weights.

    Args:
        overrides: As for `config_of`.
        with_engine: Read them back from ZeRO instead of from the model.

    Returns:
        One piece for each local parameter.
    """
    with stage_of(overrides) as stage:
        if not with_engine:
            shards = name_shards(stage.model, stage.mesh)
            return [piece_of(shard, shard.parameter) for shard in shards]
        with engine_of(stage) as engine:
            return [
                piece_of(shard, engine.states.get(shard.parameter, "weight"))
                for shard in engine.shards
            ]


def trained_weights(
    overrides: Overrides,
) -> tuple[dict[str, NDArray[np.float32]], list[Piece]]:
    """Takes a step.

    Args:
        overrides: As for `config_of`.

    Returns:
        The whole weights, as every rank gathers them, and the pieces that this one holds.
    """
    with stage_of(overrides) as stage, engine_of(stage) as engine:
        batches = batches_of(stage.config, stage.mesh.dp.rank, stage.mesh.dp.size)
        engine.train_step(0, batches.read_step(0), 0.01)
        model = stage.config.model
        wholes = gather_weights(model, engine.shards, engine.states, stage.mesh)
        gathered = {name: whole.numpy().copy() for name, whole in wholes}
        return gathered, [
            piece_of(shard, engine.states.get(shard.parameter, "weight")) for shard in engine.shards
        ]


def initial_weights(
    overrides: Overrides, names: list[str], rows: range | None = None
) -> dict[str, NDArray[np.float32]]:
    """Initial weights by their definition.

    Args:
        overrides: As for `config_of`.
        names: Which.
        rows: Rows to draw; None: all.

    Returns:
        Weights by name.
    """
    config = config_of(overrides)
    return {name: draw_initial_weight(name, config.model, config.run.seed, rows) for name in names}
