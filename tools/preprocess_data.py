"""Turns text, or tokens of other programs, into token shards (.bin, .idx) with a manifest."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.files import read_path
from megatron_mdm.corpus.inputs import EXTENSIONS, TOKEN_EXTENSIONS
from megatron_mdm.corpus.options import PreprocessOptions, array_task
from megatron_mdm.corpus.preprocess import Preprocessed, preprocess
from megatron_mdm.corpus.sources import HubDataset
from megatron_mdm.corpus.token_files import FORMATS, RAW_DTYPES
from megatron_mdm.data.shards import read_output_prefix


def main() -> None:
    """Preprocesses the inputs, or one array task's share of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    formats = ", ".join(EXTENSIONS) + ", folders of datasets.save_to_disk, or files of tokens: "
    formats += ", ".join(TOKEN_EXTENSIONS)
    source.add_argument("--input", type=read_path, nargs="+", help=formats)
    source.add_argument("--dataset", help="a data set of the Hugging Face hub instead, streamed")
    add("--dataset-config", help="its configuration, if it has several")
    add("--split", help="the split of a data set or folder (default for --dataset: train)")
    add("--tokenizer", required=True, help="a folder, a file (docs/data.md) or a hub name")
    add(
        "--output-prefix",
        type=read_output_prefix,
        required=True,
        help="the shards' path without .bin and .idx",
    )
    add("--workers", type=int, default=1, help="processes that encode (default 1)")
    add("--text-key", default="text", help="JSON key or column of the text")
    add("--ids-key", metavar="KEY", help="JSON key or column of token ids, instead of text")
    add("--format", choices=FORMATS, help="of files of tokens (default: recognised)")
    add("--dtype", choices=list(RAW_DTYPES), help="of raw tokens (default: recognised)")
    add(
        "--split-at-eod",
        action=argparse.BooleanOptionalAction,
        help="cut tokens after each end-of-document id (default: files yes, rows no)",
    )
    add("--copy", action="store_true", help="write tokens anew where they could stay")
    add("--show", type=int, default=3, metavar="N", help="documents of ids to show decoded (3)")
    add("--eod-token", help="ends a document (default: the tokenizer's own)")
    add("--valid-fraction", type=float, help="hold out this share, by a hash, as PREFIX-valid")
    add("--hold-out-by", choices=["ids", "text"], default="ids", help="hash of documents of ids")
    add("--on-error", choices=["stop", "skip"], default="stop", help="what a bad record does")
    add("--resume", action="store_true", help="go on with an unfinished job, if there is one")
    add("--overwrite", action="store_true", help="replace shards that something else made")
    add("--task", type=int, help="do only this share, from 0, of --num-tasks; see merge_data.py")
    add("--num-tasks", type=int, help="the number of shares")
    add("--array", action="store_true", help="take both from SLURM's array variables")
    arguments = parser.parse_args()
    inputs = arguments.input
    if inputs is None:
        split = arguments.split or "train"
        inputs = HubDataset(arguments.dataset, arguments.dataset_config, split)
    names = {field.name for field in dataclasses.fields(PreprocessOptions)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    given["task"] = array_task(arguments.task, arguments.num_tasks, from_slurm=arguments.array)
    start_seconds = time.perf_counter()
    made = preprocess(
        inputs, arguments.tokenizer, arguments.output_prefix, PreprocessOptions(**given)
    )
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
    sys.exit(run_entry_point(main))
