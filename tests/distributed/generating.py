"""What ranks do in test_generate_from_checkpoint: samples and logits of a checkpoint."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from cases import Overrides, batches_of, engine_of, stage_of
from resuming import save, writer_of

from megatron_mdm.config.objective import RunWay
from megatron_mdm.diffusion.decoding import Decoding
from megatron_mdm.inference.checkpoint import TrainedModel, open_checkpoint
from megatron_mdm.inference.models import SamplingBatch
from megatron_mdm.inference.options import make_generation_options
from megatron_mdm.inference.prompts import Prompt
from megatron_mdm.inference.sampling import generate, make_drafts


def train_and_save(overrides: Overrides, folder: str) -> None:
    """Trains two steps at a high rate, so that no weight is what it was, and saves.

    Args:
        overrides: As for `cases.config_of`.
        folder: Where checkpoints lie.
    """
    with (
        stage_of(overrides) as stage,
        engine_of(stage) as engine,
        writer_of(stage, Path(folder)) as writer,
    ):
        batches = batches_of(stage.config, stage.mesh.dp.rank, stage.mesh.dp.size)
        for step in range(2):
            engine.train_step(step, batches.read_step(step), 0.05)
        save(writer, stage, engine, 2)


def _opened(
    checkpoint: Path, tokenizer: Path, sizes: tuple[int, int], way: RunWay | None = None
) -> AbstractContextManager[TrainedModel]:
    tensor, pipeline = sizes
    return open_checkpoint(
        checkpoint,
        way=way,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        tokenizer=str(tokenizer),
    )


def samples(
    checkpoint: Path,
    tokenizer: Path,
    sizes: tuple[int, int],
    requests: list[dict[str, Any]],
    settings: dict[str, Any],
    way: RunWay | None = None,
) -> list[list[int]] | None:
    """Token ids of all samples, on the rank that drives; None on the others.

    Args:
        checkpoint: The checkpoint.
        tokenizer: Its tokenizer's folder.
        sizes: Tensor-parallel and pipeline-parallel size.
        requests: Fields of requests.
        settings: Fields of the settings.
        way: How a mixture of objectives runs.

    Returns:
        The ids, in the order of the requests.
    """
    found: list[list[int]] | None = None
    settings = dict(settings)
    options = make_generation_options(settings.pop("decoding", {}), **settings)
    with _opened(checkpoint, tokenizer, sizes, way) as model:
        fields = [Prompt(**request) for request in requests]
        drafts = make_drafts(fields, options, model.facts, model.tokenizer)

        def work() -> None:
            nonlocal found
            found = [sample.ids for sample in generate(model, drafts, options.batch_size)]

        model.run_on_driver(work)
    return found


def first_logits(
    checkpoint: Path, tokenizer: Path, sizes: tuple[int, int], rows: list[list[int]]
) -> Any:
    """Logits of whole sequences of several lengths, as generation computes them.

    Args:
        checkpoint: The checkpoint.
        tokenizer: Its tokenizer's folder.
        sizes: Tensor-parallel and pipeline-parallel size.
        rows: Token ids.

    Returns:
        float32 [B, S, vocabulary rows] on the rank that drives, None on the others.
    """
    logits = None
    with _opened(checkpoint, tokenizer, sizes) as model:
        lengths = [len(row) for row in rows]
        width = max(lengths)
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])

        def work() -> None:
            nonlocal logits
            logits = model._forward.compute_logits(tokens, lengths).numpy()

        model.run_on_driver(work)
    return logits


def failing_work(checkpoint: Path, tokenizer: Path, sizes: tuple[int, int]) -> str | None:
    """What becomes of an error on the rank that drives; the others have to get away.

    Args:
        checkpoint: The checkpoint.
        tokenizer: Its tokenizer's folder.
        sizes: Tensor-parallel and pipeline-parallel size.

    Returns:
        The message on the rank that drives, None on the others.
    """
    with _opened(checkpoint, tokenizer, sizes) as model:

        def work() -> None:
            batch = SamplingBatch(
                tokens_BS=torch.tensor([[1, 2]]),
                is_real_BS=torch.ones(1, 2, dtype=torch.bool),
                guidance_BS=None,
                seeds=[1, 2],
                decoding=Decoding(),
            )
            model.complete(batch)

        try:
            model.run_on_driver(work)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None
