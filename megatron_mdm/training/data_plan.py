"""What a run will read: shards, mixture, length and ledger, checked before anything starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mdm.config import Config, SourceConfig
from megatron_mdm.corpus.tokenizer import (
    TokenizerHandle,
    check_mask_token,
    load_tokenizer,
)
from megatron_mdm.data.ledger import SourceLedger, repetition_ledger
from megatron_mdm.data.loader import Allocate, TrainingBatches
from megatron_mdm.data.manifest import check_manifest, manifest_path
from megatron_mdm.data.mixture import SampleOrder, check_caps, share_visits, stated_samples
from megatron_mdm.data.opening import open_windows
from megatron_mdm.data.stream import TokenSource
from megatron_mdm.data.views import open_tokens
from megatron_mdm.data.windows import Windows, WindowSource
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.errors import DataError
from megatron_mdm.scaling.accounting import predicted_share, training_steps

# Token ids of larger shard sets are checked window by window as they are read: a scan of two
# gigatokens takes seconds, and a start must not take longer the larger the corpus is.
_MAX_TOKENS_TO_SCAN = 2_000_000_000


@dataclass(frozen=True)
class DataPlan:
    """The data of a run that can start.

    Attributes:
        train: Training windows.
        valid: Held-out windows, None without held-out shards.
        order: Global sample order.
        num_steps: Optimizer steps.
        fingerprint: Content of the training data.
        predicted_shares: Expected share of each source's tokens whose logits the loss needs.
    """

    train: Windows
    valid: Windows | None
    order: SampleOrder
    num_steps: int
    fingerprint: str
    predicted_shares: list[float]

    @property
    def head_share(self) -> float:
        """Expected share of the run's tokens whose logits the loss needs."""
        visits = self.order.counts(self.order.total)
        pairs = zip(visits, self.predicted_shares, strict=True)
        return sum(count * share for count, share in pairs) / self.order.total


def plan_data(config: Config) -> DataPlan:
    """Opens and checks the data of a run, and shares its samples out.

    Args:
        config: A checked configuration.

    Returns:
        The plan.

    Raises:
        ConfigError: The mixture is impossible.
        DataError: Shards are missing, damaged or of another tokenizer.
    """
    data, batch = config.data, config.batch.global_batch_size
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
    train = _open_windows(config, data.train, tokenizer)
    valid = _open_windows(config, data.valid, tokenizer) if data.valid else None
    windows = [source.num_windows for source in train.sources]
    stated = stated_samples(data.train, windows)
    num_steps = training_steps(config, train.num_windows, stated)
    total = num_steps * batch
    check_caps(data.train, windows, total, seq_length=data.seq_length, global_batch_size=batch)
    order = SampleOrder(
        share_visits(data.train, windows, total),
        windows,
        seq_length=data.seq_length,
        kind=data.order,
        seed=config.run.seed,
    )
    shares = [predicted_share(config, source.learned_share) for source in train.sources]
    return DataPlan(train, valid, order, num_steps, train.fingerprint(), shares)


def ledger_at(
    config: Config, plan: DataPlan, step: int, predictions: Sequence[int] | None = None
) -> list[SourceLedger]:
    """The repetition ledger of a run after some steps.

    Args:
        config: The run.
        plan: Its data.
        step: Optimizer steps taken.
        predictions: Predictions counted in training for each source.

    Returns:
        The ledger of each source.
    """
    return repetition_ledger(
        [source.path for source in config.data.train],
        plan.order,
        step * config.batch.global_batch_size,
        seq_length=config.data.seq_length,
        predicted_shares=plan.predicted_shares,
        predictions=predictions,
    )


def training_batches(
    config: Config,
    data: DataPlan,
    *,
    data_parallel_rank: int,
    data_parallel_size: int,
    allocate: Allocate = np.empty,
) -> TrainingBatches:
    """The batches of a run: whatever learns from them gets the same noise of the same samples.

    Args:
        config: The run.
        data: What `plan_data` made of it.
        data_parallel_rank: Which share of each batch is read.
        data_parallel_size: Shares.
        allocate: Makes the arrays of a batch.

    Returns:
        The batches of one data-parallel rank.
    """
    return TrainingBatches(
        data.train.sources,
        data.order,
        build_objective(
            config.objective,
            seed=config.run.seed,
            global_batch_size=config.batch.global_batch_size,
            mask_token_id=config.model.mask_id,
            finetuning=config.finetuning,
        ),
        global_batch_size=config.batch.global_batch_size,
        micro_batch_size=config.batch.micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        repeated_noise=config.objective.noise == "repeated",
        allocate=allocate,
    )


def _open_windows(
    config: Config, sources: Sequence[SourceConfig], tokenizer: TokenizerHandle | None
) -> Windows:
    opened: list[WindowSource] = []
    for source in sources:
        shards = open_tokens(source.path)
        _check_source(config, source, shards, tokenizer)
        opened.append(open_windows(config, source, shards))
    return Windows(opened)


def _check_source(
    config: Config, source: SourceConfig, shards: TokenSource, tokenizer: TokenizerHandle | None
) -> None:
    model, manifest = config.model, shards.manifest
    if manifest is not None:
        check_manifest(
            manifest,
            path=manifest_path(shards.prefix),
            vocab_size=model.vocab_size,
            tokenizer_sha256=tokenizer.sha256 if tokenizer else None,
        )
        if config.objective.kind == "mdm":
            check_mask_token(
                model.mask_id,
                special_tokens=manifest.special_tokens,
                vocab_size=model.vocab_size,
                eod_token_id=manifest.eod_token_id,
            )
    first_process = os.environ.get("RANK", "0") == "0"
    if first_process and shards.num_tokens <= _MAX_TOKENS_TO_SCAN:
        found = shards.find_token_at_or_above(model.vocab_size)
        if found is not None:
            raise DataError(
                f"{source.path} holds the token id {found[1]} at token {found[0]}, beyond "
                f"model.vocab_size={model.vocab_size}: set model.vocab_size to the tokenizer's, or "
                "make the shards anew with tools/preprocess_data.py."
            )
