"""Dividing documents into those to train on and those held out, by a hash of each."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_mdm.corpus.encoding import EncodedBatch
from megatron_mdm.corpus.records import BadRecord


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


def divide(batch: EncodedBatch, is_held_out: npt.NDArray[np.bool_] | None) -> list[EncodedSide]:
    """Divides documents.

    Args:
        batch: The documents.
        is_held_out: Which of them are held out, bool [documents]; None for no division.

    Returns:
        One side, or with a division two: to train on, and held out.
    """
    if is_held_out is None:
        return [_side(batch)]
    return [_side(batch, ~is_held_out), _side(batch, is_held_out)]


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


def _side(batch: EncodedBatch, chosen: npt.NDArray[np.bool_] | None = None) -> EncodedSide:
    tokens, lengths = batch
    if chosen is not None:
        tokens, lengths = tokens[np.repeat(chosen, lengths)], lengths[chosen]
    kept = lengths[lengths > 0]
    return EncodedSide(tokens, kept, len(lengths) - len(kept), int(tokens.max(initial=0)))
