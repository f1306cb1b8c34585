"""Which tokenizer made a run's data: what is recorded of it, and whether another one is the same.

A name alone does not tell: a path may be relative to a folder that nobody is in any more, and a
file may have changed since.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.tokenizer import (
    TokenizerHandle,
    find_tokenizer,
    hash_tokenizer,
    open_tokenizer,
)
from megatron_mdm.data.manifest import Manifest


class TokenizerRecord(BaseModel):
    """The tokenizer of a run.

    Attributes:
        name: The name or path as it was given.
        place: The absolute path where it lay when training started; None: it is no path, or
            another tokenizer or none lay there.
        sha256: The hash of its canonical serialisation, in hexadecimal.
        vocab_size: Its largest token id plus one.
        eod_token: The token that ends a document; None: it is no special token of it.
        eod_token_id: Its id.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    place: str | None = None
    sha256: str
    vocab_size: int
    eod_token: str | None
    eod_token_id: int

    def describe_difference(self, sha256: str, name: str) -> str | None:
        """Says that a tokenizer is not the recorded one.

        Args:
            sha256: The hash of the other one.
            name: What to call it.

        Returns:
            A sentence, or None if it is the same.
        """
        if sha256 == self.sha256:
            return None
        return (
            f"the tokenizer {name} (sha256 {sha256[:12]}) is not the one that made the training "
            f"data ({self.place or self.name}, sha256 {self.sha256[:12]}): its ids may stand for "
            "other text."
        )


def record_tokenizer(handle: TokenizerHandle) -> TokenizerRecord:
    """Records a tokenizer that was loaded."""
    path = Path(handle.name).expanduser()
    return TokenizerRecord(
        name=handle.name,
        place=str(path.absolute()) if path.exists() else None,
        sha256=handle.sha256,
        vocab_size=handle.vocab_size,
        eod_token=handle.eod_token,
        eod_token_id=handle.eod_token_id,
    )


def record_tokenizer_of_shards(manifest: Manifest) -> TokenizerRecord:
    """Records the tokenizer that made shards, with its place if it still lies where they say."""
    path = Path(manifest.tokenizer).expanduser()
    is_there = hash_tokenizer_at(path) == manifest.tokenizer_sha256
    end = manifest.eod_token_id
    return TokenizerRecord(
        name=manifest.tokenizer,
        place=str(path.absolute()) if is_there else None,
        sha256=manifest.tokenizer_sha256,
        vocab_size=manifest.vocab_size,
        eod_token=next((token for token, i in manifest.special_tokens.items() if i == end), None),
        eod_token_id=end,
    )


def hash_tokenizer_at(path: Path) -> str | None:
    """Hashes the tokenizer at a path.

    Args:
        path: A folder or a file, of a tokenizer.json or of what is converted to one.

    Returns:
        The hash of its canonical serialisation; None: there is none.

    Raises:
        DataError: It is damaged, or cannot be converted.
    """
    file = find_tokenizer(path)
    return None if file is None else hash_tokenizer(open_tokenizer(file)[0])


def find_recorded_tokenizer(record: TokenizerRecord) -> str:
    """Finds a run's tokenizer again.

    Args:
        record: What the run, or its data, recorded.

    Returns:
        A path or a Hugging Face name to load it from. At its own place it may have changed since;
        a relative path counts only where it leads to the same content.

    Raises:
        DataError: Another tokenizer lies where the name leads from the current folder.
    """
    if record.place is not None and Path(record.place).exists():
        return record.place
    here = Path(record.name).expanduser()
    found = hash_tokenizer_at(here)
    if found is not None and found != record.sha256:
        raise DataError(
            f"{here.absolute()} (sha256 {found[:12]}) is not the tokenizer {record.name!r} that "
            f"made the training data (sha256 {record.sha256[:12]}): give that one, or the one to "
            "use, as --tokenizer."
        )
    return record.name
