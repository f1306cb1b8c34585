"""What ranks do for a pair of runs: judge windows, and take the mean of an epoch's losses."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from cases import NUM_WINDOWS, Overrides, TokenWindows, batches_of, engine_of, mean_loss, stage_of

from megatron_mdm.config.schema import ValidationConfig
from megatron_mdm.data.windows import Windows
from megatron_mdm.training.data_plan import DataContent
from megatron_mdm.training.epochs import EpochLoss, Epochs
from megatron_mdm.training.validation import Validation


class Source(TokenWindows):
    """Windows in memory, as the validation reads them.

    Args:
        config: The run.
        is_held_out: Give other tokens than those of training.
    """

    def __init__(self, config: Any, is_held_out: bool = False) -> None:
        super().__init__(config)
        if is_held_out:
            self._tokens = (self._tokens + 1) % config.model.vocab_size

    def find_documents(self, window_N: np.ndarray) -> np.ndarray:
        """Every three windows are a document."""
        return window_N // 3


def judge(overrides: Overrides, validation: dict[str, int]) -> dict[str, Any]:
    """Validates initial weights.

    Args:
        overrides: As for `config_of`.
        validation: Fields of the section of this name.

    Returns:
        The metrics, and the clean windows [calls, B, S] that this rank's model was given: held-out
        ones, then those of training.
    """
    given: list[np.ndarray] = []
    with stage_of(overrides) as stage, engine_of(stage) as engine:
        settings = ValidationConfig(**validation)
        config = stage.config.model_copy(update={"validation": settings})
        clean = "inputs_BS" if config.objective.kind == "ar" else "targets_BS"

        def record(_: torch.nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.append(kwargs[clean].numpy().copy())

        stage.model.register_forward_pre_hook(record, with_kwargs=True)
        train, valid = (Windows([Source(config, held_out)]) for held_out in (False, True))
        content = DataContent("train", "valid")
        metrics, judged = Validation(config, train, valid, content)(engine)
        return {"metrics": metrics, "judged": judged, "windows": np.stack(given)}


def epoch_means(
    overrides: Overrides,
    num_steps: int,
    first_step: int = 0,
    skipped: int = 0,
    resumed_after: int = 0,
) -> dict[str, Any]:
    """Trains, and takes the means of epochs on the way.

    Args:
        overrides: As for `config_of`.
        num_steps: Steps from the start of the run.
        first_step: Steps that the run had taken before.
        skipped: Number of a step, from 1, to call left out.
        resumed_after: Number of a step after which another object goes on with the saved state.

    Returns:
        The loss of each step, and after each the epoch's mean, if it has one.
    """
    losses, means = [], []
    with stage_of(overrides) as stage, engine_of(stage) as engine:
        size = stage.config.batch.global_batch_size
        epochs, device = Epochs(NUM_WINDOWS, size), engine.mesh.device
        epoch_loss = EpochLoss(epochs, first_step, device)
        batches = batches_of(stage.config, stage.mesh.dp.rank, stage.mesh.dp.size)
        for step in range(first_step, num_steps):
            result = engine.train_step(step, batches.read_step(step), 1e-3)
            epoch_loss.add(step + 1, result.loss_sum, step + 1 != skipped)
            losses.append(mean_loss(engine, result.loss_sum, size))
            means.append(epoch_loss.mean(step + 1))
            if step + 1 == resumed_after:
                epoch_loss.before_save(SimpleNamespace(mesh=engine.mesh))
                state = json.loads(json.dumps(epoch_loss.state_dict()))
                epoch_loss = EpochLoss(epochs, step + 1, device)
                epoch_loss.load_state_dict(state)
    return {"losses": losses, "means": means}
