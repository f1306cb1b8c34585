"""`mdm tokenizer`: trains one, or converts one."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import open_whole_file, write_errors
from megatron_mdm.core.options import make_app
from megatron_mdm.corpus.inputs import open_sources
from megatron_mdm.corpus.readers import read_documents, sample_documents
from megatron_mdm.corpus.records import RecordKey
from megatron_mdm.corpus.tokenizer import load_tokenizer
from megatron_mdm.corpus.tokenizer_training import save_tokenizer, train_byte_level_bpe


def train(
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
    """Trains a byte-level BPE, or reuses the one that the same inputs made.

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
    if not overwrite and _is_reusable(output, recipe):
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


def _is_reusable(folder: Path, recipe: dict[str, object]) -> bool:
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


def convert(
    *, input: str, output: Path, eod_token: str | None = None, overwrite: bool = False
) -> None:
    """Converts a tokenizer to tokenizer.json.

    Args:
        input: The file or folder, or a Hugging Face name.
        output: The folder to write tokenizer.json to.
        eod_token: Ends a document; by default the tokenizer's own.
        overwrite: Replace a tokenizer that is there.
    """
    existing = output / "tokenizer.json"
    if existing.exists() and not overwrite:
        raise DataError(
            f"{existing} exists: replace it with --overwrite or choose another --output."
        )
    tokenizer = load_tokenizer(input, eod_token)
    save_tokenizer(tokenizer.backend, output, tokenizer.eod_token)
    print(
        f"{output}: {tokenizer.vocab_size} tokens, documents end with "
        f"{tokenizer.eod_token!r}, sha256 {tokenizer.sha256[:12]}"
    )


app = make_app(
    {"train": train, "convert": convert},
    "Trains a tokenizer, or converts one.",
    name="tokenizer",
    examples=(
        "mdm tokenizer train --input corpus/*.jsonl --vocab-size 16384 --output data/tokenizer",
        "mdm tokenizer convert --input tokenizer.model --output data/tokenizer",
    ),
)
