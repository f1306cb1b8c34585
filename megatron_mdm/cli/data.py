"""Commands on text and token shards."""

from __future__ import annotations

import dataclasses
import sysconfig
import time
from pathlib import Path

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import read_path
from megatron_mdm.corpus.options import PreprocessOptions, find_array_task
from megatron_mdm.corpus.preprocess import Preprocessed, preprocess
from megatron_mdm.corpus.slicing import By, slice_corpus
from megatron_mdm.corpus.sources import HubDataset
from megatron_mdm.data.export import Format, export_tokens
from megatron_mdm.data.merge import merge_parts
from megatron_mdm.data.merge import remove_parts as remove_merged_parts
from megatron_mdm.data.shards import read_output_prefix
from megatron_mdm.data.subset import make_subset, name_subset
from megatron_mdm.studies.stdlib_corpus import gather_python_corpus

_DEFAULTS = PreprocessOptions()


def prepare(
    *,
    input: list[Path] | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    tokenizer: str,
    output_prefix: str,
    task: int | None = None,
    num_tasks: int | None = None,
    array: bool = False,
    options: PreprocessOptions = _DEFAULTS,
) -> None:
    """Preprocesses the inputs, or one array task's share of them.

    Args:
        input: .jsonl, .ndjson, .json and .txt files, also .gz and .zst, .parquet files, folders of
            datasets.save_to_disk, or files of tokens (.bin, .npy, .ds).
        dataset: A data set of the Hugging Face hub instead, streamed.
        dataset_config: Its configuration, if it has several.
        tokenizer: A folder, a file (docs/data.md) or a hub name.
        output_prefix: The shards' path without .bin and .idx.
        task: Do only this share, from 0, of --num-tasks; see mdm merge.
        num_tasks: The number of shares.
        array: Take both from SLURM's array variables.
        options: How.
    """
    if (input is None) == (dataset is None):
        raise ConfigError("give --input with files, or --dataset with the name of one.")
    inputs: list[Path] | HubDataset = list(map(read_path, input or []))
    if dataset is not None:
        inputs = HubDataset(dataset, dataset_config, options.split or "train")
    prefix = read_output_prefix(output_prefix)
    share = find_array_task(task, num_tasks, from_slurm=array)
    start_seconds = time.perf_counter()
    made = preprocess(inputs, tokenizer, prefix, dataclasses.replace(options, task=share))
    _report(made, time.perf_counter() - start_seconds)


def _report(made: Preprocessed, seconds: float) -> None:
    for prefix, manifest in zip(made.prefixes, made.manifests, strict=True):
        skipped, bad = manifest.num_skipped_documents, manifest.num_bad_records
        print(
            f"{prefix}: {manifest.num_documents} documents"
            + (f" ({skipped} without text skipped)" if skipped else "")
            + (f" ({bad} bad records skipped)" if bad else "")
            + f", {manifest.num_tokens} tokens of {manifest.dtype}"
        )
    if made.num_bytes:
        print(
            f"{seconds:.1f} s: {made.num_tokens / seconds:.0f} tokens/s, "
            f"{made.num_bytes / 1e6 / seconds:.1f} MB/s"
            + (f", encoded with {made.backend}" if made.backend else "")
        )


def merge(
    *, prefix: str, copy: bool = False, remove_parts: bool = False, overwrite: bool = False
) -> None:
    """Merges the parts at PREFIX.parts into PREFIX.

    Args:
        prefix: The path of the whole; parts in PREFIX.parts.
        copy: Write .bin and .idx, not a view.
        remove_parts: Remove the parts once the copy is on disk.
        overwrite: Replace other shards at PREFIX.
    """
    if remove_parts and not copy:
        raise ConfigError("--remove-parts without --copy would lose the tokens: add --copy.")
    path = read_output_prefix(prefix)
    whole = merge_parts(path, copy, overwrite)
    print(f"{path}: {whole.num_documents} documents, {whole.num_tokens} tokens")
    if remove_parts:
        remove_merged_parts(path)
        print(f"{path}.parts: removed")


def subset(
    *,
    input: Path,
    tokens: list[int],
    output_prefix: str,
    seed: int = 0,
    in_order: bool = False,
    skip_tokens: int = 0,
    copy: bool = False,
    overwrite: bool = False,
) -> None:
    """Makes one subset for each size.

    Args:
        input: Shards or a view, path without extension.
        tokens: The sizes in tokens.
        output_prefix: Followed by -25M and the like.
        seed: Decides the documents.
        in_order: Take documents as they are stored, not at random.
        skip_tokens: Leave out the documents that hold the first so many tokens.
        copy: Write .bin and .idx, for Megatron's own readers.
        overwrite: Replace what another request made.
    """
    source, prefix = read_path(input), read_output_prefix(output_prefix)
    for num_tokens in sorted(set(tokens)):
        output = Path(f"{prefix}-{name_subset(num_tokens)}")
        order = None if in_order else seed
        made = make_subset(source, output, num_tokens, order, copy, overwrite, skip_tokens)
        print(f"{output}: {made.num_documents} documents, {made.num_tokens} tokens")


def slice_by_key(*, input: list[Path], output: Path, key: str, by: By = "value") -> None:
    """Divides the inputs and prints what each slice holds.

    Args:
        input: .jsonl files, perhaps compressed.
        output: Folder of the slices.
        key: JSON key that decides, such as domain or date.
        by: Value, or a period of a date.
    """
    for name, count in slice_corpus(input, output, key, by).items():
        print(f"{output / name}.jsonl: {count} records")


def export(*, input: Path, format: Format, output: Path, overwrite: bool = False) -> None:
    """Exports one stream.

    Args:
        input: Shards or a view, path without extension.
        format: Of the file.
        output: The file to write.
        overwrite: Replace a file that exists.
    """
    record = export_tokens(input, output, format, overwrite)
    print(f"{output}: {record.num_documents} documents, {record.num_tokens} tokens, {record.dtype}")


def gather_stdlib(
    *,
    output: Path,
    root: Path | None = None,
    valid_fraction: float = 0.05,
    functions: bool = False,
) -> None:
    """Writes train.jsonl, valid.jsonl and corpus.json.

    Args:
        output: The folder to write to.
        root: The folder of Python sources; by default this Python's standard library.
        valid_fraction: The share of files to hold out, in [0, 1).
        functions: A document for each function at the top level of a file, not for each file.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    counts = gather_python_corpus(root, output, valid_fraction, functions=functions)
    print(
        f"{output}: {counts.train_documents} training documents "
        f"({counts.train_bytes / 1e6:.2f} MB), {counts.valid_documents} validation documents "
        f"({counts.valid_bytes / 1e6:.2f} MB)"
    )
