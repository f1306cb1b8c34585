"""Trains a byte-level BPE tokenizer on text files."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import DataError, run_entry_point
from megatron_mdm.core.files import whole_file
from megatron_mdm.corpus.inputs import EXTENSIONS, open_sources
from megatron_mdm.corpus.readers import read_documents, sample_documents
from megatron_mdm.corpus.records import RecordKey
from megatron_mdm.corpus.tokenizer import load_tokenizer, save_tokenizer, train_byte_level_bpe
from megatron_mdm.data.manifest import write_errors


def main() -> None:
    """Trains and saves a tokenizer, or reuses the one that the same inputs made."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    formats = ", ".join(EXTENSIONS) + ", or folders of datasets.save_to_disk"
    add("--input", type=Path, nargs="+", required=True, help=formats)
    add("--split", help="the split of a folder with several")
    add("--vocab-size", type=int, default=4096, help="257 or more (default 4096)")
    add("--output", type=Path, required=True, help="the folder to write to")
    add("--text-key", default="text", help="JSON key or column of the text")
    add("--max-documents", type=int, help="train on an even sample of at most so many")
    add("--max-bytes", type=int, help="train on an even sample of at most so much text")
    add("--overwrite", action="store_true", help="replace another tokenizer")
    arguments = parser.parse_args()
    key, split, limits = (
        arguments.text_key,
        arguments.split,
        (arguments.max_documents, arguments.max_bytes),
    )
    sources = [source.describe() for source in open_sources(arguments.input, RecordKey(key), split)]
    recipe = {
        "vocab_size": arguments.vocab_size,
        "text_key": key,
        "inputs": [[Path(file.path).name, file.size_bytes, file.sha256] for file in sources],
    } | ({"sample": list(limits)} if any(limits) else {})
    if not arguments.overwrite and is_reusable(arguments.output, recipe):
        print(f"reusing {arguments.output}: the same inputs made it")
        return
    documents = itertools.chain.from_iterable(
        read_documents(path, key, split) for path in arguments.input
    )
    sample = sample_documents(documents, *limits)
    save_tokenizer(train_byte_level_bpe(sample, arguments.vocab_size), arguments.output)
    tokenizer = load_tokenizer(str(arguments.output))
    made = {"recipe": recipe, "tokenizer_sha256": tokenizer.sha256}
    with write_errors(arguments.output), whole_file(arguments.output / "training.json") as stream:
        stream.write(json.dumps(made, indent=2).encode("utf-8") + b"\n")
    print(f"{arguments.output}: {tokenizer.vocab_size} tokens, sha256 {tokenizer.sha256[:12]}")


def is_reusable(folder: Path, recipe: dict[str, object]) -> bool:
    """Tells whether a folder holds what a recipe gives; raises DataError for another tokenizer."""
    if not (folder / "tokenizer.json").exists():
        return False
    made = folder / "training.json"
    expected = {"recipe": recipe, "tokenizer_sha256": load_tokenizer(str(folder)).sha256}
    with contextlib.suppress(OSError, ValueError):
        if json.loads(made.read_bytes()) == expected:
            return True
    raise DataError(
        f"--output={folder} holds a tokenizer that these inputs did not make: replace it with "
        "--overwrite or choose another folder."
    )


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
