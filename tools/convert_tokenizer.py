"""Converts a tokenizer of SentencePiece, tekken, tiktoken or GPT-2's files to a tokenizer.json.

Every id is compared with the original library's, over the whole vocabulary and on hard texts.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import DataError, run_entry_point
from megatron_mdm.core.options import run_command
from megatron_mdm.corpus.tokenizer import load_tokenizer
from megatron_mdm.corpus.tokenizer_training import save_tokenizer


def main(
    *, input: str, output: Path, eod_token: str | None = None, overwrite: bool = False
) -> None:
    """Converts one tokenizer.

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


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
