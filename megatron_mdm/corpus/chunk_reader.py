"""From chunks to documents of tokens, to train on or held out. What workers do with a chunk."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.encoding import (
    BackendChoice,
    BatchEncoder,
    EncodedBatch,
    EncodingSettings,
    make_encoder,
)
from megatron_mdm.corpus.records import BadRecord, parse_chunk
from megatron_mdm.corpus.sources import Chunk


class EncodedSide(NamedTuple):
    """The documents of a chunk that go to one pair of shards.

    Attributes:
        tokens: All tokens in a row, of the shards' type, shape [sum of lengths].
        lengths: The tokens of each document, 1 or more, int32, shape [documents].
        num_skipped_documents: The documents without a token, which are not among them.
        max_token_id: The largest token id, 0 without tokens.
    """

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    num_skipped_documents: int
    max_token_id: int


class EncodedChunk(NamedTuple):
    """A chunk, encoded.

    Attributes:
        sides: The documents to train on, and those held out where the corpus is divided.
        bad_records: The records that hold no document.
    """

    sides: list[EncodedSide]
    bad_records: list[BadRecord]


@dataclass(frozen=True, kw_only=True)
class ChunkReader(ABC):
    """Makes documents of tokens out of chunks. Pickled to workers, it is plain values.

    Attributes:
        settings: The tokenizer, the shards' type, how documents end and are divided.
    """

    settings: EncodingSettings

    @abstractmethod
    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Reads a chunk.

        Args:
            chunk: The chunk.

        Returns:
            Its documents and bad records.

        Raises:
            DataError: A document holds the end-of-document token inside.
            EncodingMismatch: The encoding libraries disagree.
        """

    def _divide(
        self, batch: EncodedBatch, contents: Iterable[bytes], bad_records: list[BadRecord]
    ) -> EncodedChunk:
        """Divides documents by a hash of their contents, which are read only for that."""
        fraction = self.settings.valid_fraction
        if fraction is None:
            return EncodedChunk([_select_side(batch)], bad_records)
        held_out = [is_small_hash(content, fraction) for content in contents]
        is_held_out = np.array(held_out, dtype=bool)
        sides = [_select_side(batch, ~is_held_out), _select_side(batch, is_held_out)]
        return EncodedChunk(sides, bad_records)


@dataclass(frozen=True, kw_only=True)
class TextReader(ChunkReader):
    """Parses and encodes chunks of text.

    Attributes:
        text_key: The JSON key that holds the text.
        choice: The library that encodes, with the tokenizer translated for it, so that not every
            process has to.
    """

    text_key: str
    choice: BackendChoice

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """See `ChunkReader.encode`."""
        texts, bad_records = parse_chunk(chunk, self.text_key)
        if bad_records and not self.settings.skip_bad_records:
            return EncodedChunk([], bad_records)
        batch = self._encoder.encode_batch(texts)
        return self._divide(batch, (text.encode("utf-8") for text in texts), bad_records)

    @cached_property
    def _encoder(self) -> BatchEncoder:
        return make_encoder(self.settings, self.choice.backend, self.choice.vocabulary)


def is_small_hash(content: bytes, valid_fraction: float) -> bool:
    """Decides by a hash of its content on which side of the division a document falls.

    Args:
        content: The document's bytes.
        valid_fraction: The share of documents to hold out, in [0, 1).

    Returns:
        True if the first 8 bytes of BLAKE2b, as a fraction of 2^64, are below the share.
    """
    digest = hashlib.blake2b(content, digest_size=8).digest()
    # Integers compare exactly where 64 bits do not fit a float.
    return int.from_bytes(digest, "big") < valid_fraction * 2.0**64


def check_valid_fraction(valid_fraction: float | None) -> None:
    """Checks the share of documents to hold out.

    Args:
        valid_fraction: The share; None for no division.

    Raises:
        DataError: It is not between 0 and 1.
    """
    if valid_fraction is not None and not 0 < valid_fraction < 1:
        raise DataError(
            f"--valid-fraction={valid_fraction} has to be between 0 and 1, both excluded: use such "
            "as 0.01, or leave it out."
        )


def _select_side(batch: EncodedBatch, chosen: npt.NDArray[np.bool_] | None = None) -> EncodedSide:
    tokens, lengths = batch
    if chosen is not None:
        tokens, lengths = tokens[np.repeat(chosen, lengths)], lengths[chosen]
    kept = lengths[lengths > 0]
    return EncodedSide(tokens, kept, len(lengths) - len(kept), int(tokens.max(initial=0)))
