"""Turns text, or tokens of other programs, into token shards (.bin, .idx) with a manifest."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import ConfigError, run_entry_point
from megatron_mdm.core.files import read_path
from megatron_mdm.core.options import run_command
from megatron_mdm.corpus.options import PreprocessOptions, find_array_task
from megatron_mdm.corpus.preprocess import Preprocessed, preprocess
from megatron_mdm.corpus.sources import HubDataset
from megatron_mdm.data.shards import read_output_prefix

DEFAULTS = PreprocessOptions()


def main(
    *,
    input: list[Path] | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    tokenizer: str,
    output_prefix: str,
    task: int | None = None,
    num_tasks: int | None = None,
    array: bool = False,
    options: PreprocessOptions = DEFAULTS,
) -> None:
    """Preprocesses the inputs, or one array task's share of them.

    Args:
        input: .jsonl, .ndjson, .json and .txt files, also .gz and .zst, .parquet files, folders of
            datasets.save_to_disk, or files of tokens (.bin, .npy, .ds).
        dataset: A data set of the Hugging Face hub instead, streamed.
        dataset_config: Its configuration, if it has several.
        tokenizer: A folder, a file (docs/data.md) or a hub name.
        output_prefix: The shards' path without .bin and .idx.
        task: Do only this share, from 0, of --num-tasks; see merge_data.py.
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
    report(made, time.perf_counter() - start_seconds)


def report(made: Preprocessed, seconds: float) -> None:
    """Prints what each pair of shards holds, and how fast it went."""
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


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
