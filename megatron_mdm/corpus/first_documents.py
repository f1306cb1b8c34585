"""What is checked before a job starts: the first documents of ids, and the division of files."""

from __future__ import annotations

import logging
from codecs import BOM_UTF8
from collections.abc import Sequence

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.chunk_reader import is_small_hash
from megatron_mdm.corpus.ids import IdRows, IdsReader, read_rows
from megatron_mdm.corpus.sample import show_documents
from megatron_mdm.corpus.sources import SourceShare, TextSource
from megatron_mdm.corpus.tokenizer import TokenizerHandle

_LOG = logging.getLogger(__name__)
# So many rows of one length are no coincidence.
_MANY_ROWS = 16
# With so many documents expected on the smaller side, it is empty once in a billion times.
_SURELY_DIVIDED = 20


def check_first_documents(
    shares: Sequence[SourceShare],
    reader: IdsReader,
    tokenizer: TokenizerHandle,
    num_shown: int,
) -> None:
    """Reads the first chunk, tells of its ends of documents and shows some of it decoded.

    Args:
        shares: What is read.
        reader: What reads it.
        tokenizer: What should have made the ids.
        num_shown: How many documents to show.

    Raises:
        DataError: The rows are windows of a stream that was not said to be one, or a stream has no
            end of a document.
    """
    for source, span in shares:
        chunk = next(source.read_chunks(span, span.start, 1), None)
        if chunk is None:
            continue
        rows = read_rows(chunk, reader.ids_key or "")
        if reader.is_copied and not reader.is_cut:
            _tell_of_windows(rows, source.label, tokenizer)
        usable = reader.read(chunk)
        if not len(usable.lengths):
            # No usable document: the job itself says what is wrong.
            return
        ends = usable.lengths.cumsum()
        documents = (
            usable.tokens[end - length : end]
            for end, length in zip(ends.tolist(), usable.lengths.tolist(), strict=True)
        )
        for line in show_documents(documents, tokenizer, num_shown):
            _LOG.info("%s", line)
        return


def check_division(shares: Sequence[SourceShare], valid_fraction: float) -> None:
    """Divides documents that are whole files before any is encoded, if they are few.

    Args:
        shares: What is read. Where a file holds many documents, nothing is checked.
        valid_fraction: The share of documents to hold out.

    Raises:
        DataError: All documents fall on one side, or a file cannot be read.
    """
    smaller = len(shares) * min(valid_fraction, 1 - valid_fraction)
    if smaller > _SURELY_DIVIDED or not all(isinstance(one.source, TextSource) for one in shares):
        return
    held_out = [
        is_small_hash(chunk.data.removeprefix(BOM_UTF8), valid_fraction)
        for source, span in shares
        for chunk in source.read_chunks(span, 0, 1)
        if chunk.data
    ]
    if held_out and len(set(held_out)) == 1:
        side = "training" if held_out[0] else "held-out"
        raise DataError(
            f"--valid-fraction={valid_fraction} leaves no {side} documents of these "
            f"{len(held_out)} files: use another fraction or more documents."
        )


def _tell_of_windows(rows: IdRows, label: str, tokenizer: TokenizerHandle) -> None:
    """Refuses windows with ends of documents inside; tells how many rows have an end."""
    ends = rows.lengths.cumsum()
    places = np.flatnonzero(rows.tokens == tokenizer.eod_token_id)
    num_ended = int(np.isin(ends[rows.lengths > 0] - 1, places).sum())
    num_rows = len(rows.lengths)
    is_uniform = num_rows > 1 and int(rows.lengths.min()) == int(rows.lengths.max()) > 1
    if is_uniform and len(places) > num_ended:
        raise DataError(
            f"{label}: its first {num_rows} rows all hold {rows.lengths[0]} ids, with "
            f"end-of-document ids {tokenizer.eod_token_id} inside, so they are windows of one "
            "stream: cut it there with --split-at-eod."
        )
    _LOG.info(
        "%s: %d of the first %d rows end with the end-of-document id %d (%r); it is added to the "
        "others",
        label,
        num_ended,
        num_rows,
        tokenizer.eod_token_id,
        tokenizer.eod_token,
    )
    if is_uniform and num_rows >= _MANY_ROWS and num_ended == 0:
        _LOG.warning(
            "%s: its first %d rows all hold %d ids and no end of a document; if they are windows "
            "of one stream, name the token that ends its documents with --eod-token and add "
            "--split-at-eod",
            label,
            num_rows,
            rows.lengths[0],
        )
