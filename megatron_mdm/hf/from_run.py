"""A checkpoint, of a run or of weights alone, as an exported model."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer

from megatron_mdm.checkpoint.manifest import RAW, CheckpointManifest, read_saved_model
from megatron_mdm.checkpoint.storage import CheckpointReader, name_checkpoint, resolve_checkpoint
from megatron_mdm.core.errors import CheckpointError, ConversionError
from megatron_mdm.corpus.tokenizer import find_tokenizer, load_tokenizer, read_end_and_size
from megatron_mdm.corpus.tokenizer_formats import find_foreign
from megatron_mdm.corpus.tokenizer_record import (
    TokenizerRecord,
    find_recorded_tokenizer,
    hash_tokenizer_at,
)
from megatron_mdm.corpus.tokenizer_training import save_tokenizer
from megatron_mdm.data.chat_template import find_chat_template
from megatron_mdm.hf.card import TrainingFacts, collect_run_facts
from megatron_mdm.hf.export import ExportResult, export_to_hf
from megatron_mdm.hf.tokenizer_files import check_tokenizer_folder
from megatron_mdm.reporting.run_folder import UNIGRAM_NATS, RunFolder


class _Vocabulary(NamedTuple):
    """The tokenizer of an export.

    Attributes:
        folder: With tokenizer.json; None without a tokenizer.
        eos_token_id: Id that ends a document, if it is known.
        record: What the run recorded of it, or else its data; None: nothing is known.
        remark: One sentence if it differs from the recorded one.
    """

    folder: Path | None
    eos_token_id: int | None
    record: TokenizerRecord | None = None
    remark: str | None = None


def export_run(
    run_dir: Path,
    output: Path,
    *,
    step: int | None = None,
    weights: str = RAW,
    dtype: torch.dtype = torch.float32,
    tokenizer: str | None = None,
    overwrite: bool = False,
) -> ExportResult:
    """Exports a checkpoint with its tokenizer.

    Args:
        run_dir: The run's folder, its `checkpoints` folder or a checkpoint, also one of weights
            alone.
        output: Folder to write.
        step: Checkpoint to take; None: the latest.
        weights: `raw`, or the name of an average of the weights that the checkpoint holds.
        dtype: Dtype of the exported weights.
        tokenizer: Folder or name of the tokenizer; None: the one that the run states.
        overwrite: Replace an export that differs.

    Returns:
        What was written, or found to be there already.

    Raises:
        CheckpointError: There is no such checkpoint or average, or it is damaged.
        DataError: The tokenizer, or what the run left of its training, is gone or damaged, or
            another tokenizer stands in its place.
        ConversionError: The output exists and differs, or cannot be written.
    """
    path = find_checkpoint_to_export(run_dir, step)
    reader = CheckpointReader(path, weights)
    with tempfile.TemporaryDirectory() as scratch:
        reader.check_complete()
        manifest = reader.manifest
        vocabulary = _find_vocabulary(manifest, tokenizer, Path(scratch))
        result = export_to_hf(
            reader,
            read_saved_model(manifest),
            output,
            tokenizer_dir=vocabulary.folder,
            chat_template=find_chat_template(manifest.chat_template, manifest.config),
            eos_token_id=vocabulary.eos_token_id,
            dtype=dtype,
            metadata=_list_metadata(manifest, vocabulary.record, weights)
            | _list_counts(path, manifest),
            facts=_collect_facts(path, manifest, weights),
            title=_find_title(manifest),
            overwrite=overwrite,
        )
    told = () if vocabulary.remark is None else (vocabulary.remark,)
    return replace(result, remarks=(*told, *result.remarks))


def find_checkpoint_to_export(path: Path, step: int | None) -> Path:
    """Finds a checkpoint.

    Args:
        path: A run's folder, its `checkpoints` folder or a checkpoint.
        step: Optimizer steps taken; None: the latest.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: It is not there.
    """
    if step is None:
        return resolve_checkpoint(path)
    name = name_checkpoint(step)
    for folder in (path / "checkpoints", path):
        if (folder / name).is_dir():
            return folder / name
    raise CheckpointError(
        f"{path} holds no checkpoint {name}: give --run a run that saved it, or leave out --step."
    )


def _find_title(manifest: CheckpointManifest) -> str | None:
    is_of_run = manifest.kind == "training" or manifest.average_of is not None
    return Path(manifest.config["run"]["dir"]).name if is_of_run else None


def _list_metadata(
    manifest: CheckpointManifest, record: TokenizerRecord | None, weights: str = RAW
) -> dict[str, Any]:
    fields = {"kind": manifest.kind, "versions": manifest.versions, "config": manifest.config}
    tokenizer = {} if record is None else {"tokenizer": record.model_dump(exclude={"place"})}
    if manifest.average_of is not None:
        return fields | tokenizer | {"average_of": manifest.average_of.model_dump(mode="json")}
    if manifest.kind == "weights":
        return fields
    # Where there is nothing to choose from, an export is what it was before there were averages.
    chosen: dict[str, Any] = {"weights": weights} if manifest.averages else {}
    if weights != RAW:
        chosen["average"] = manifest.averages[weights]
    return {
        **chosen,
        "step": manifest.step,
        "consumed_samples": manifest.consumed_samples,
        "skipped_steps": manifest.skipped_steps,
        "data_fingerprint": manifest.data_fingerprint,
        "predictions": manifest.state.get("predictions", {}).get("per_source", []),
        **tokenizer,
        **fields,
    }


def _list_counts(path: Path, manifest: CheckpointManifest) -> dict[str, float]:
    """What counts of tokens say of a run's text, as far as the run knows it."""
    run = RunFolder(path.absolute().parent.parent)
    nats = run.unigram_nats_per_token if manifest.kind == "training" else None
    return {} if nats is None else {UNIGRAM_NATS: nats}


def _collect_facts(path: Path, manifest: CheckpointManifest, weights: str) -> TrainingFacts:
    if manifest.kind == "training":
        # A reshaped checkpoint lies elsewhere: the card then says which facts are missing.
        return collect_run_facts(path.absolute().parent.parent, manifest, weights)
    if manifest.average_of is not None:
        return TrainingFacts(
            f"Its weights are {manifest.average_of.describe()}.",
            versions=manifest.versions,
            gaps=["No held-out loss of this mean was recorded."],
        )
    return TrainingFacts(
        "It comes from a checkpoint of weights alone.",
        versions=manifest.versions,
        gaps=["A checkpoint of weights alone does not say how they were trained, or on what."],
    )


def _find_vocabulary(
    manifest: CheckpointManifest, tokenizer: str | None, scratch: Path
) -> _Vocabulary:
    is_nameless = manifest.kind == "weights" and manifest.average_of is None
    if is_nameless and tokenizer is None:
        return _Vocabulary(None, None)
    record = manifest.tokenizer
    if tokenizer is None:
        stated = manifest.config["data"].get("tokenizer")
        tokenizer = stated if record is None else find_recorded_tokenizer(record)
    end = None if record is None else record.eod_token_id
    folder = _find_tokenizer_folder(tokenizer, scratch)
    if folder is None:
        return _Vocabulary(None, end, record)
    eos_token_id, size = read_end_and_size(folder / "tokenizer.json")
    vocab_size = read_saved_model(manifest).model.vocab_size
    # An imported model may have more rows than its tokenizer has tokens.
    fits = size <= vocab_size if record is None else size == record.vocab_size
    if not fits:
        other = f"the model {vocab_size}" if record is None else f"its data {record.vocab_size}"
        raise ConversionError(
            f"The tokenizer {tokenizer} has {size} tokens and {other}: give the one that it was "
            "trained with as --tokenizer."
        )
    sha256 = hash_tokenizer_at(folder)
    remark = record.describe_difference(sha256, str(tokenizer)) if record and sha256 else None
    return _Vocabulary(folder, eos_token_id if record is None else end, record, remark)


def _find_tokenizer_folder(name: str | None, scratch: Path) -> Path | None:
    if name is None:
        return None
    path = Path(name)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        file = find_tokenizer(path)
        if file is not None and find_foreign(file) is not None:
            handle = load_tokenizer(name)
            save_tokenizer(handle.backend, scratch, handle.eod_token)
            return scratch
        check_tokenizer_folder(folder)
        return folder
    # A hub name, or a path that is gone: loading tells which.
    load_tokenizer(name)
    AutoTokenizer.from_pretrained(name, trust_remote_code=False).save_pretrained(scratch)
    return scratch
