"""Trains a byte-level BPE tokenizer on text files."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.corpus.readers import check_source, read_documents
from megatron_mdm.corpus.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    train_byte_level_bpe,
)
from megatron_mdm.data.manifest import SourceFile, write_errors
from megatron_mdm.errors import DataError, run_entry_point
from megatron_mdm.files import whole_file


def main() -> None:
    """Trains and saves a tokenizer, or reuses the one that the same inputs made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input", type=Path, nargs="+", required=True, help=".jsonl, .jsonl.gz, .txt, .parquet"
    )
    parser.add_argument("--vocab-size", type=int, default=4096, help="257 or more (default 4096)")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--text-key", default="text", help="JSON key or column of the text")
    parser.add_argument("--overwrite", action="store_true", help="replace another tokenizer")
    arguments = parser.parse_args()
    for path in arguments.input:
        check_source(path)
    sources = [SourceFile.of(path) for path in arguments.input]
    recipe = {
        "vocab_size": arguments.vocab_size,
        "text_key": arguments.text_key,
        "inputs": [[Path(file.path).name, file.size_bytes, file.sha256] for file in sources],
    }
    if not arguments.overwrite and is_reusable(arguments.output, recipe):
        print(f"reusing {arguments.output}: the same inputs made it")
        return
    documents = itertools.chain.from_iterable(
        read_documents(path, arguments.text_key) for path in arguments.input
    )
    save_tokenizer(train_byte_level_bpe(documents, arguments.vocab_size), arguments.output)
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
