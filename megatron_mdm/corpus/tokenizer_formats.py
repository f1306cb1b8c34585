"""Files of tokenizers in other libraries' formats: which there are, and what converts each.

SentencePiece's `.model`, Mistral's `tekken.json`, tiktoken's files of ranks, and `vocab.json` with
`merges.txt`. What converts one is loaded when a file of that format is opened, and not before.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from pathlib import Path

from tokenizers import Tokenizer

from megatron_mdm.core.errors import DataError, unreadable_error
from megatron_mdm.core.registry import Registry

VOCABULARY_NAME, MERGES_NAME = "vocab.json", "merges.txt"
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


class TokenizerFormat(ABC):
    """A format of another library."""

    @abstractmethod
    def open(self, path: Path) -> tuple[Tokenizer, str | None]:
        """Converts a tokenizer, and compares its ids with those of the original library.

        Args:
            path: A file of this format.

        Returns:
            The tokenizer; its end-of-sequence token, None if none is named.

        Raises:
            DataError: The file is damaged, says too little, needs a library that is not there, or
                some text gets other ids.
        """


TOKENIZER_FORMATS: Registry[TokenizerFormat] = Registry(
    "a format of tokenizers",
    TokenizerFormat,
    {
        "merges": "megatron_mdm.corpus.foreign_tokenizers:MergesFormat",
        "ranks": "megatron_mdm.corpus.foreign_tokenizers:RanksFormat",
        "sentencepiece": "megatron_mdm.corpus.foreign_tokenizers:SentencePieceFormat",
        "tekken": "megatron_mdm.corpus.foreign_tokenizers:TekkenFormat",
    },
)


def find_foreign(path: Path) -> Path | None:
    """Finds the file of a tokenizer in another library's format.

    Args:
        path: A file; or a folder without tokenizer.json.

    Returns:
        The file, of `vocab.json` and `merges.txt` the first; None if there is none.

    Raises:
        DataError: A folder holds several, or one without the other.
    """
    if not path.is_dir():
        if path.suffix == ".json":
            return path if _is_tekken(path) or path.name == VOCABULARY_NAME else None
        # Such as tokenizer.model.v3.
        is_foreign = ".model" in path.suffixes or path.suffix == ".tiktoken"
        return path if is_foreign or path.name == MERGES_NAME else None
    files = [one for one in sorted(path.iterdir()) if one.is_file()]
    found = [one for one in files if one.name != MERGES_NAME and find_foreign(one)]
    if len(found) > 1:
        raise DataError(
            f"{path} holds {found[0].name} and {found[1].name}: give the path of one of them."
        )
    return found[0] if found else None


def open_foreign(path: Path) -> tuple[Tokenizer, str | None]:
    """Converts a tokenizer and compares the ids.

    Args:
        path: A file of `find_foreign`.

    Returns:
        As `TokenizerFormat.open`.

    Raises:
        DataError: As `TokenizerFormat.open`.
    """
    return TOKENIZER_FORMATS.find(_recognize_format(path), str(path))().open(path)


def _recognize_format(path: Path) -> str:
    if path.name in (VOCABULARY_NAME, MERGES_NAME):
        return "merges"
    if _is_tekken(path):
        return "tekken"
    try:
        with path.open("rb") as stream:
            return "ranks" if _RANK_LINE.match(stream.readline(4096)) else "sentencepiece"
    except OSError as error:
        raise unreadable_error(path, error) from error


def _is_tekken(path: Path) -> bool:
    return path.suffix == ".json" and path.name.startswith("tekken")
