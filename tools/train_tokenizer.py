"""Trains a byte-level BPE tokenizer on text files."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import DataError, run_entry_point
from megatron_mdm.core.files import open_whole_file, write_errors
from megatron_mdm.core.options import run_command
from megatron_mdm.corpus.inputs import open_sources
from megatron_mdm.corpus.readers import read_documents, sample_documents
from megatron_mdm.corpus.records import RecordKey
from megatron_mdm.corpus.tokenizer import load_tokenizer
from megatron_mdm.corpus.tokenizer_training import save_tokenizer, train_byte_level_bpe


def main(
    *,
    input: list[Path],
    output: Path,
    split: str | None = None,
    vocab_size: int = 4096,
    text_key: str = "text",
    max_documents: int | None = None,
    max_bytes: int | None = None,
    overwrite: bool = False,
) -> None:
    """Trains and saves a tokenizer, or reuses the one that the same inputs made.

    Args:
        input: .jsonl, .ndjson, .json and .txt files, also .gz and .zst, .parquet files, or folders
            of datasets.save_to_disk.
        output: The folder to write to.
        split: The split of a folder with several.
        vocab_size: 257 or more.
        text_key: JSON key or column of the text.
        max_documents: Train on an even sample of at most so many.
        max_bytes: Train on an even sample of at most so much text.
        overwrite: Replace another tokenizer.
    """
    limits = (max_documents, max_bytes)
    sources = [source.describe() for source in open_sources(input, RecordKey(text_key), split)]
    recipe = {
        "vocab_size": vocab_size,
        "text_key": text_key,
        "inputs": [[Path(file.path).name, file.size_bytes, file.sha256] for file in sources],
    } | ({"sample": list(limits)} if any(limits) else {})
    if not overwrite and is_reusable(output, recipe):
        print(f"reusing {output}: the same inputs made it")
        return
    documents = itertools.chain.from_iterable(
        read_documents(path, text_key, split) for path in input
    )
    sample = sample_documents(documents, *limits)
    save_tokenizer(train_byte_level_bpe(sample, vocab_size), output)
    tokenizer = load_tokenizer(str(output))
    made = {"recipe": recipe, "tokenizer_sha256": tokenizer.sha256}
    with write_errors(output), open_whole_file(output / "training.json") as stream:
        stream.write(json.dumps(made, indent=2).encode("utf-8") + b"\n")
    print(f"{output}: {tokenizer.vocab_size} tokens, sha256 {tokenizer.sha256[:12]}")


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
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
