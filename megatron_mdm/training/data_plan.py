"""What a run will read: shards, mixture, length and ledger, checked before anything starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from megatron_mdm.config import Config, SourceConfig
from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.corpus.mask_token import check_mask_token
from megatron_mdm.corpus.tokenizer import TokenizerHandle, load_tokenizer
from megatron_mdm.corpus.tokenizer_record import (
    TokenizerRecord,
    record_tokenizer,
    record_tokenizer_of_shards,
)
from megatron_mdm.data.chat_template import list_chat_templates
from megatron_mdm.data.ledger import SourceLedger, count_repetition
from megatron_mdm.data.loader import Allocate, TrainingBatches
from megatron_mdm.data.manifest import check_manifest, manifest_path
from megatron_mdm.data.mixture import (
    OrderStart,
    SampleOrder,
    check_caps,
    count_stated_samples,
    share_visits,
)
from megatron_mdm.data.opening import open_source, open_windows
from megatron_mdm.data.overlap import SharedContent, describe_shared_content, find_shared_content
from megatron_mdm.data.source import TokenSource
from megatron_mdm.data.windows import Windows, WindowSource
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.diffusion.stochastic_depth import build_stochastic_depth
from megatron_mdm.model.accounting import count_steps

# Token ids of larger shard sets are checked window by window as they are read: a scan of two
# gigatokens takes seconds, and a start must not take longer the larger the corpus is.
_MAX_TOKENS_TO_SCAN = 2_000_000_000


class DataContent(NamedTuple):
    """What identifies the data of a run.

    Attributes:
        train: The fingerprint of the training windows.
        valid: That of the held-out ones, "" without any.
    """

    train: str
    valid: str


@dataclass(frozen=True)
class DataPlan:
    """The data of a run that can start.

    Attributes:
        train: Training windows.
        valid: Held-out windows, None without held-out shards.
        order: Global sample order.
        num_steps: Optimizer steps.
        tokenizer: What made the data; None where it does not say so. Found by the first process
            alone.
        predicted_shares: Expected share of each source's tokens whose logits the loss needs.
        remarks: What a user should know: content that is repeated, sources that are not used. Found
            by the first process alone.
        read_elsewhere: The content, if another process of this machine has read it.
        order_start: Where the order begins, if the run had another mixture or length before.
    """

    train: Windows
    valid: Windows | None
    order: SampleOrder
    num_steps: int
    tokenizer: TokenizerRecord | None
    predicted_shares: list[float]
    remarks: list[str]
    read_elsewhere: DataContent | None = None
    order_start: OrderStart | None = None

    def read_content(self) -> DataContent:
        """Identifies the data.

        Returns:
            What it is; the tokens are read the first time.
        """
        if self.read_elsewhere is not None:
            return self.read_elsewhere
        return DataContent(self.train.fingerprint(), self.valid.fingerprint() if self.valid else "")

    @property
    def fingerprint(self) -> str:
        """Content of the training data."""
        return self.read_content().train

    @property
    def chat_templates(self) -> list[str]:
        """Templates that told conversations, the one to use first; none for plain text."""
        return list_chat_templates(source.source.manifest for source in self.train.sources)

    @property
    def head_share(self) -> float:
        """Expected share of the run's tokens whose logits the loss needs."""
        visits = self.order.count_visits(self.order.total)
        pairs = zip(visits, self.predicted_shares, strict=True)
        return sum(count * share for count, share in pairs) / self.order.total


def plan_data(config: Config, *, export: Path | None = None) -> DataPlan:
    """Opens and checks the data of a run, and shares its samples out.

    Args:
        config: A checked configuration.
        export: The exported model that learns from it, which `config.model` describes; None: the
            run's own.

    Raises:
        ConfigError: The mixture is impossible.
        DataError: Shards are missing, damaged or of another tokenizer.
    """
    data, batch = config.data, config.batch.global_batch_size
    train = _open_windows(config, "train", export)
    valid = _open_windows(config, "valid", export) if data.valid else None
    # After the shards: a name on the hub may take a while to answer.
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
    for opened in (train, valid) if tokenizer is not None else ():
        for shards in opened.sources if opened is not None else ():
            _check_vocabulary(config, shards.source, tokenizer, export)
    windows = [source.num_windows for source in train.sources]
    stated = count_stated_samples(data.train, windows)
    num_steps = count_steps(config, train.num_windows, stated)
    total = num_steps * batch
    check_caps(data.train, windows, total, seq_length=data.seq_length, global_batch_size=batch)
    order = order_samples(config, windows, num_steps)
    objective, seq_length = build_objective(config), config.data.seq_length
    shares = [
        objective.predicted_share(seq_length, source.learned_share) for source in train.sources
    ]
    record, remarks = None, []
    if _is_first_process():
        record = _find_tokenizer(tokenizer, train)
        remarks = _check_content(config, train, valid, order)
    if export is None:
        remarks += _describe_unused_ids(config, train)
    plan = DataPlan(train, valid, order, num_steps, record, shares, remarks)
    if len(plan.chat_templates) > 1:
        remarks.append("the sources have several chat templates: exports name that of the first")
    return plan


def order_samples(
    config: Config, windows: Sequence[int], num_steps: int, start: OrderStart | None = None
) -> SampleOrder:
    """Orders the samples of a run.

    Args:
        config: The run.
        windows: Windows of each source.
        num_steps: Its steps.
        start: Where the order begins; weights and epochs speak of what follows it.

    Returns:
        The order.

    Raises:
        ConfigError: The mixture is impossible.
    """
    data = config.data
    rest = num_steps * config.batch.global_batch_size - (0 if start is None else start.sample)
    visits = share_visits(data.train, windows, rest)
    for number, source in enumerate(data.train):
        seen = visits[number] + (0 if start is None else start.visits[number])
        if start is not None and source.max_epochs and seen > source.max_epochs * windows[number]:
            raise ConfigError(
                f"data.train.{number}.max_epochs={source.max_epochs} does not let {source.path} "
                f"last: the run would see its {windows[number]} windows "
                f"{seen / windows[number]:.4g} times in all: lower its share, or raise max_epochs."
            )
    return SampleOrder(
        visits,
        windows,
        seq_length=data.seq_length,
        kind=data.order,
        seed=config.run.seed,
        start=start,
    )


def compute_ledger(
    config: Config, plan: DataPlan, step: int, predictions: Sequence[int] | None = None
) -> list[SourceLedger]:
    """Computes the repetition ledger of a run after some steps.

    Args:
        config: The run.
        plan: Its data.
        step: Optimizer steps taken.
        predictions: Predictions counted in training for each source.
    """
    return count_repetition(
        [source.path for source in config.data.train],
        plan.order,
        step * config.batch.global_batch_size,
        seq_length=config.data.seq_length,
        predicted_shares=plan.predicted_shares,
        predictions=predictions,
    )


def open_batches(
    config: Config,
    data: DataPlan,
    *,
    data_parallel_rank: int,
    data_parallel_size: int,
    allocate: Allocate = np.empty,
) -> TrainingBatches:
    """Opens the batches of a run, with the same samples and noise for whatever trains on them.

    Args:
        config: The run.
        data: What `plan_data` made of it.
        data_parallel_rank: Which share of each batch is read.
        data_parallel_size: Shares.
        allocate: Makes the arrays of a batch.
    """
    return TrainingBatches(
        data.train.sources,
        data.order,
        build_objective(config),
        global_batch_size=config.batch.global_batch_size,
        micro_batch_size=config.batch.micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        allocate=allocate,
        draw_inputs=build_stochastic_depth(config),
    )


def _find_tokenizer(tokenizer: TokenizerHandle | None, train: Windows) -> TokenizerRecord | None:
    manifest = train.sources[0].source.manifest
    if tokenizer is None:
        return None if manifest is None else record_tokenizer_of_shards(manifest)
    record = record_tokenizer(tokenizer)
    if manifest is None:
        return record
    # The data may end its documents with another token than the tokenizer's own.
    return record_tokenizer_of_shards(manifest).model_copy(
        update={"name": record.name, "place": record.place}
    )


def _check_content(
    config: Config, train: Windows, valid: Windows | None, order: SampleOrder
) -> list[str]:
    """Refuses caps that do not hold once shared content is counted; returns remarks on content."""
    data = config.data
    visits = order.count_visits(order.total)
    epochs = [count / windows for count, windows in zip(visits, order.windows, strict=True)]
    remarks = [
        f"data.train.{number} ({source.path}) gets none of the run's {order.total:,} windows"
        for number, source in enumerate(data.train)
        if not visits[number]
    ]
    windows = [*train.sources, *(valid.sources if valid else [])]
    used = [one.num_windows * data.seq_length for one in windows]
    if config.finetuning.enabled:
        # Pairs are packed into windows with filling between them.
        used = [one.source.num_tokens for one in windows]
    shared = find_shared_content([one.source for one in windows], used)
    num_train = len(data.train)
    names = [f"data.train.{number}" for number in range(num_train)]
    names += [f"data.valid.{number}" for number in range(len(windows) - num_train)]
    for content in shared:
        trained = {number: n for number, n in content.times.items() if number < num_train}
        total = SharedContent(trained, content.num_tokens).epochs(epochs)
        for number in trained:
            cap = data.train[number].max_epochs
            if cap is not None and total > cap + 1 / order.windows[number]:
                raise ConfigError(
                    f"data.train.{number}.max_epochs={cap} does not hold over content: "
                    f"{content.num_tokens} of its tokens stand more than once in data.train, and "
                    f"the run would see them {total:.4g} times: take them out of the other sources "
                    "(mdm inspect --plan names these), lower epochs, or raise max_epochs."
                )
    in_train = [one for one in shared if max(one.times) < num_train]
    remarks += describe_shared_content(in_train, names, epochs)
    for content in shared:
        held_out = [number for number in content.times if number >= num_train]
        if held_out and min(content.times) < num_train:
            remarks.append(
                f"{content.num_tokens:,} tokens of {names[held_out[0]]} are trained on: its loss "
                "is not that of unseen text"
            )
    return remarks


def _describe_unused_ids(config: Config, train: Windows) -> list[str]:
    """Tells of ids that the head predicts and the data's tokenizer never makes."""
    manifests = [windows.source.manifest for windows in train.sources]
    size = max((one.vocab_size for one in manifests if one is not None), default=0)
    model = config.model
    if None in manifests or size >= model.vocab_size:
        return []
    return [
        f"the data has a vocabulary of {size} tokens and model.vocab_size={model.vocab_size}, so "
        f"that ids which no text holds are predicted too: a run with model.vocab_size={size} and "
        f"model.padded_vocab_size={model.vocabulary_rows} keeps their rows and leaves them out"
    ]


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _open_windows(
    config: Config,
    split: Literal["train", "valid"],
    export: Path | None,
) -> Windows:
    opened: list[WindowSource] = []
    sources: Sequence[SourceConfig] = config.data.train if split == "train" else config.data.valid
    for number, source in enumerate(sources):
        shards = open_source(source, f"data.{split}.{number}")
        _check_vocabulary(config, shards, None, export)
        _check_tokens(config, source, shards, export)
        opened.append(open_windows(config, source, shards))
    return Windows(opened)


def _choose_mask_id(config: Config, export: Path | None) -> int | None:
    """The mask id that the model has by default; None where its weights decide."""
    is_given = export is not None or config.run.initial_weights is not None
    return None if is_given else config.model.vocabulary_rows


def _check_vocabulary(
    config: Config,
    shards: TokenSource,
    tokenizer: TokenizerHandle | None,
    export: Path | None,
) -> None:
    model, manifest = config.model, shards.manifest
    if manifest is None:
        return
    has_rows = model.padded_vocab_size is not None or config.run.initial_weights is not None
    check_manifest(
        manifest,
        path=manifest_path(shards.prefix),
        vocab_size=model.vocab_size,
        tokenizer_sha256=tokenizer.sha256 if tokenizer else None,
        export=export,
        num_rows=model.vocabulary_rows if has_rows else None,
    )
    if build_objective(config).uses_mask_token:
        check_mask_token(
            model.mask_id,
            special_tokens=manifest.special_tokens,
            vocab_size=manifest.vocab_size,
            eod_token_id=manifest.eod_token_id,
            own_id=_choose_mask_id(config, export),
        )


def _check_tokens(
    config: Config, source: SourceConfig, shards: TokenSource, export: Path | None
) -> None:
    model, manifest = config.model, shards.manifest
    if not _is_first_process() or shards.num_tokens > _MAX_TOKENS_TO_SCAN:
        return
    # What this package encoded cannot hold the mask token; foreign token ids are searched for it.
    is_masked = build_objective(config).uses_mask_token and model.mask_id < model.vocab_size
    is_foreign = manifest is None or manifest.ids is not None
    reserved = model.mask_id if is_masked and is_foreign else None
    found = shards.find_token_outside(model.vocab_size, reserved)
    if found is None:
        return
    place = f"{source.path} holds the token id {found[1]} at token {found[0]}"
    anew = "make the shards anew with mdm prepare"
    if found[1] == reserved:
        own_id = _choose_mask_id(config, export)
        remedy = "set it to that of the weights, and make the shards with their tokenizer"
        if own_id is not None:
            remedy = (
                "set it to a token that no text holds, or leave it out, which masks with the "
                f"model's own id {own_id}"
            )
        raise DataError(f"{place}, which is model.mask_token_id: {remedy}.")
    if found[1] < 0:
        raise DataError(f"{place}, and ids begin at 0: {anew}.")
    wider = "" if export is not None else "set model.vocab_size to the tokenizer's, or "
    raise DataError(f"{place}, beyond model.vocab_size={model.vocab_size}: {wider}{anew}.")
