"""Generation from a training checkpoint, in one process or divided over ranks by Megatron-Core."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mdm.checkpoint.manifest import (
    RAW,
    CheckpointManifest,
    SavedModel,
    read_saved_model,
)
from megatron_mdm.checkpoint.restoring import load_weights
from megatron_mdm.checkpoint.storage import CheckpointReader, resolve_checkpoint
from megatron_mdm.config import check_model_splits, divide_model
from megatron_mdm.config.objective import RunWay
from megatron_mdm.core.errors import ConfigError, MdmError
from megatron_mdm.core.remarks import warn
from megatron_mdm.corpus.conversations import ChatTemplate, load_chat_template
from megatron_mdm.corpus.tokenizer import TokenizerHandle, load_tokenizer
from megatron_mdm.corpus.tokenizer_record import TokenizerRecord, find_recorded_tokenizer
from megatron_mdm.data.chat_template import find_chat_template
from megatron_mdm.diffusion.noise_sampler import sample_noise
from megatron_mdm.diffusion.sampler_state import Window
from megatron_mdm.diffusion.samplers import StepCallback, sample, sample_left_to_right
from megatron_mdm.distributed.mesh import open_mesh
from megatron_mdm.distributed.processes import join_process_group, read_world_size, resolve_device
from megatron_mdm.inference.models import ModelFacts, SamplingBatch
from megatron_mdm.inference.texts import wrap_tokenizer
from megatron_mdm.model.inference import DistributedForward
from megatron_mdm.model.shards import name_shards
from megatron_mdm.model.transformer import DiffusionTransformer, build_stage
from megatron_mdm.reporting.run_folder import RunFolder


class TrainedModel:
    """A `TextModel` on this rank's part of a checkpoint. Make it with `open_checkpoint`.

    Args:
        facts: What requests have to fit.
        tokenizer: The tokenizer that the training data was made with.
        forward: The model over all ranks.
        device: Where it lives.
    """

    def __init__(
        self, facts: ModelFacts, tokenizer: Any, forward: DistributedForward, device: torch.device
    ) -> None:
        self.facts = facts
        self.tokenizer = tokenizer
        self._forward = forward
        self._device = device

    def complete(self, batch: SamplingBatch, callback: StepCallback | None = None) -> Tensor:
        """See `TextModel.complete`. Only within `run_on_driver`."""
        try:
            return self._run(batch, callback).cpu()
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def run_on_driver(self, work: Callable[[], None]) -> None:
        """Does work on the driver; the workers serve its forward passes."""
        if not self._forward.is_driver:
            self._forward.serve()
            return
        try:
            work()
        except MdmError as error:
            # Told by this rank, since the workers do not know of it.
            error.rank = dist.get_rank() or None
            raise
        finally:
            self._forward.stop()

    def _run(self, batch: SamplingBatch, callback: StepCallback | None) -> Tensor:
        tokens_BS = batch.tokens_BS.to(self._device)
        options: dict[str, Any] = {
            "mask_token_id": self.facts.mask_token_id,
            "vocab_size": self.facts.vocab_size,
            "seeds": batch.seeds,
            "callback": callback,
        }
        if self.facts.is_causal:
            return sample_left_to_right(
                self._forward.compute_logits, tokens_BS, batch.decoding, **options
            )
        guidance_BS = None if batch.guidance_BS is None else batch.guidance_BS.to(self._device)
        lengths = batch.is_real_BS.sum(dim=1).tolist()
        is_ragged = not bool(batch.is_real_BS.all())

        denoiser = _DistributedDenoiser(
            self._forward, lengths if is_ragged else None, self.facts.is_shifted
        )
        options["guidance_tokens_BS"] = guidance_BS
        if self.facts.noise is not None:
            options["tells_log_snr"] = self.facts.takes_log_snr
            return sample_noise(denoiser, tokens_BS, self.facts.noise, batch.decoding, **options)
        return sample(denoiser, tokens_BS, batch.decoding, **options)


class _DistributedDenoiser:
    """A `WindowedDenoiser` on the model over all ranks.

    Args:
        forward: The model.
        lengths: Tokens of each sequence; None: all.
        is_shifted: Does the hidden state before a mask predict the token there?
    """

    def __init__(
        self, forward: DistributedForward, lengths: list[int] | None, is_shifted: bool
    ) -> None:
        self._forward, self._lengths, self._is_shifted = forward, lengths, is_shifted

    def logits_at(self, x_BS: Tensor, needed_BS: Tensor, window: Window) -> Tensor:
        """See `WindowedDenoiser.logits_at`."""
        known = self._lengths
        if known is not None:
            # Guidance doubles the batch.
            known = known * (len(x_BS) // len(known))
        logits_BSV = self._forward.compute_logits(x_BS, known, window.log_snr_B)
        # The first token is given: whatever stands there is not asked for.
        return (logits_BSV.roll(1, dims=1) if self._is_shifted else logits_BSV)[needed_BS]


@contextlib.contextmanager
def open_checkpoint(
    path: Path,
    *,
    way: RunWay | None = None,
    weights: str = RAW,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    tokenizer: str | None = None,
) -> Iterator[TrainedModel]:
    """Loads a checkpoint onto the ranks that were launched.

    Args:
        path: A checkpoint, or a run whose latest is taken; with or without the state of training.
        way: How it runs; None: as its run says.
        weights: `raw`, or the name of an average of the weights that it holds.
        tensor_parallel: Ranks per layer.
        pipeline_parallel: Pipeline stages.
        tokenizer: A folder, a tokenizer.json or a Hugging Face name; None: the run's.

    Yields:
        The model, in float32 on CPUs and bfloat16 on GPUs.

    Raises:
        CheckpointError: There is no whole checkpoint, or no such average.
        ConfigError: The ranks do not fit the model, it cannot run so, or the checkpoint names no
            tokenizer.
        DataError: The tokenizer cannot be loaded.
    """
    folder = resolve_checkpoint(path)
    reader = CheckpointReader(folder, weights)
    saved = _choose_way(read_saved_model(reader.manifest), way, folder)
    parallel = divide_model(tensor_parallel, pipeline_parallel)
    _check_ranks(tensor_parallel, pipeline_parallel)
    check_model_splits(saved.model, parallel, saved.seq_length)
    text_tokenizer, end_token_id = _load_tokenizer(folder, reader.manifest, tokenizer)
    device = resolve_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with join_process_group(device), open_mesh(parallel, device) as mesh:
        # Without interleaving a stage is one piece.
        attention, length = saved.attention, saved.seq_length
        stage = build_stage(saved.model, parallel, attention, length, mesh, dtype)
        stage = cast(DiffusionTransformer, stage)
        load_weights(reader, list(name_shards(stage, mesh)))
        facts = ModelFacts(
            name=_name_checkpoint(folder),
            is_causal=saved.is_causal,
            vocab_size=saved.model.vocab_size,
            mask_token_id=saved.model.mask_id,
            max_length=length,
            end_token_id=end_token_id,
            aligns_prompts=False,
            has_cache=False,
            noise=saved.noise,
            takes_log_snr=saved.model.time_embedding,
            is_shifted=saved.is_shifted,
            corpus_nats=RunFolder(folder.resolve().parent.parent).unigram_nats_per_token,
        )
        forward = DistributedForward(stage, mesh, dtype)
        yield TrainedModel(facts, text_tokenizer, forward, device)


def open_run_template(path: Path, tokenizer: str | None = None) -> tuple[ChatTemplate, str | None]:
    """Opens the template by which conversations are told to a checkpoint's model.

    Args:
        path: A checkpoint, or a run whose latest is taken.
        tokenizer: A folder, a tokenizer.json or a Hugging Face name; None: the run's.

    Returns:
        The template of the tokenizer, and the text of the run's own, None if it has none.

    Raises:
        MdmError: The checkpoint or its tokenizer cannot be used.
    """
    folder = resolve_checkpoint(path)
    manifest = CheckpointReader(folder).manifest
    template = load_chat_template(_name_tokenizer(folder, manifest, tokenizer))
    return template, find_chat_template(manifest.chat_template, manifest.config)


def _choose_way(saved: SavedModel, way: RunWay | None, folder: Path) -> SavedModel:
    chosen = saved.run_as(way, f"--checkpoint={folder}")
    if way == "prefix":
        raise ConfigError(
            "--run-as=prefix works with exported models only: leave it out, or export the "
            "checkpoint with mdm convert and give --model."
        )
    return chosen


def _check_ranks(tensor: int, pipeline: int) -> None:
    world_size = read_world_size()
    if world_size != tensor * pipeline:
        raise ConfigError(
            f"--tensor-parallel={tensor} times --pipeline-parallel={pipeline} is "
            f"{tensor * pipeline}, but {world_size} processes were launched: use torchrun "
            f"--nproc-per-node={tensor * pipeline}, or other sizes."
        )


def _name_checkpoint(folder: Path) -> str:
    parent = folder.resolve().parent
    return f"{(parent.parent if parent.name == 'checkpoints' else parent).name}/{folder.name}"


def _load_tokenizer(
    folder: Path, manifest: CheckpointManifest, name: str | None
) -> tuple[Any, int | None]:
    """Loads the tokenizer, of transformers, and the id that ends a text."""
    record = manifest.tokenizer
    eod_token = None if record is None or name is not None else record.eod_token
    handle = load_tokenizer(_name_tokenizer(folder, manifest, name), eod_token)
    if record is not None:
        _check_tokenizer(handle, record)
    return wrap_tokenizer(handle.backend, handle.eod_token), handle.eod_token_id


def _name_tokenizer(folder: Path, manifest: CheckpointManifest, name: str | None) -> str:
    if name is None and manifest.tokenizer is not None:
        return find_recorded_tokenizer(manifest.tokenizer)
    name = name or manifest.config["data"].get("tokenizer")
    if name is None:
        raise ConfigError(
            f"{folder} names no tokenizer: give the model's as --tokenizer, a folder or a Hugging "
            "Face name."
        )
    return name


def _check_tokenizer(handle: TokenizerHandle, record: TokenizerRecord) -> None:
    """Refuses a tokenizer of another size than the recorded one; warns of other content."""
    if handle.vocab_size != record.vocab_size:
        raise ConfigError(
            f"The tokenizer {handle.name} has {handle.vocab_size} tokens and that of the training "
            f"data {record.vocab_size}: give the one that the model was trained with as "
            "--tokenizer."
        )
    remark = record.describe_difference(handle.sha256, handle.name)
    if remark is not None and os.environ.get("RANK", "0") == "0":
        warn(remark)
