"""A look at the text in tokens, to see a wrong tokenizer before anything is trained."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.tokenizer import TokenizerHandle, load_tokenizer
from megatron_mdm.data.manifest import Manifest
from megatron_mdm.data.source import IntArray
from megatron_mdm.data.store import TokenStore

_SAMPLE_TOKENS = 64
_SHOWN_CHARACTERS = 300
_SHOWN_IDS = 8
# A byte-level token may be one byte, and a character has up to four.
_DECODED_TOKENS = 4 * _SHOWN_CHARACTERS
_LOCATED_AT_ONCE = 256


class _Glance(NamedTuple):
    """What is looked at of a document, which may be far longer."""

    first_ids: IntArray
    last_id: int | None
    num_tokens: int


def decode_sample(source: TokenStore, manifest: Manifest) -> str:
    """Decodes the first tokens.

    Args:
        source: The tokens.
        manifest: Their manifest.

    Returns:
        The text, quoted, or why it cannot be shown.
    """
    try:
        tokenizer = _load_tokenizer_of(manifest)
    except DataError as error:
        return f"not shown: {error}"
    sample = source.read(0, min(_SAMPLE_TOKENS, source.num_tokens))
    return repr(_decode(sample, tokenizer))


def show_source(source: TokenStore, count: int) -> Iterator[str]:
    """Shows the first documents of shards or a view, decoded by the tokenizer of their manifest.

    Args:
        source: The tokens. Of long documents only the beginning is read.
        count: The documents to show at most.

    Yields:
        The lines of `show_documents`; first, if there is no text to show, one that says why.

    Raises:
        DataError: The index or the extents are damaged at one of the documents.
    """
    manifest, tokenizer = source.manifest, None
    if manifest is None:
        yield "text not shown: there is no manifest, so the tokenizer is not known"
    else:
        try:
            tokenizer = _load_tokenizer_of(manifest)
        except DataError as error:
            yield f"text not shown: {error}"
    eod_token_id = manifest.eod_token_id if manifest is not None else None
    yield from _show_lines(_read_glances(source, count), tokenizer, eod_token_id)


def show_documents(
    documents: Iterable[IntArray], tokenizer: TokenizerHandle, count: int
) -> Iterator[str]:
    """Shows documents as their length, first ids, end and text; each line fits any terminal.

    Args:
        documents: The ids of each document, integers [tokens]. Ids outside the vocabulary are told
            of and left out of the text.
        tokenizer: What decodes them.
        count: The documents to show at most; no more of `documents` are taken.

    Yields:
        Two lines for each document. Control characters and ends of lines in the text are escaped.
    """
    glances = (
        _Glance(ids[:_DECODED_TOKENS], int(ids[-1]) if len(ids) else None, len(ids))
        for ids in itertools.islice(documents, count)
    )
    yield from _show_lines(glances, tokenizer, tokenizer.eod_token_id)


def _load_tokenizer_of(manifest: Manifest) -> TokenizerHandle:
    ends = [
        name for name, number in manifest.special_tokens.items() if number == manifest.eod_token_id
    ]
    # A hub tokenizer that made the shards is in the cache; without a network a search takes long.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    tokenizer = load_tokenizer(manifest.tokenizer, ends[0] if ends else None)
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise DataError(f"{manifest.tokenizer} has changed since")
    return tokenizer


def _read_glances(source: TokenStore, count: int) -> Iterator[_Glance]:
    num_shown = min(count, source.num_documents)
    for start in range(0, num_shown, _LOCATED_AT_ONCE):
        stop = min(start + _LOCATED_AT_ONCE, num_shown)
        for part, first, length in source.locate_documents(np.arange(start, stop)).tolist():
            read, end = source.parts[part].read, first + length
            last_id = int(read(end - 1, end)[0]) if length else None
            yield _Glance(read(first, min(end, first + _DECODED_TOKENS)), last_id, length)


def _show_lines(
    glances: Iterable[_Glance], tokenizer: TokenizerHandle | None, eod_token_id: int | None
) -> Iterator[str]:
    for number, glance in enumerate(glances):
        ids = ", ".join(map(str, glance.first_ids[:_SHOWN_IDS].tolist()))
        more = ", ..." if glance.num_tokens > _SHOWN_IDS else ""
        line = f"document {number}: {glance.num_tokens} tokens [{ids}{more}]"
        yield (
            line
            + _describe_end(glance.last_id, eod_token_id)
            + _describe_outside(glance, tokenizer)
        )
        if tokenizer is not None:
            text = _decode(glance.first_ids, tokenizer)
            is_cut = len(text) > _SHOWN_CHARACTERS or glance.num_tokens > len(glance.first_ids)
            yield f"    {text[:_SHOWN_CHARACTERS]!r}" + (" ..." if is_cut else "")


def _describe_end(last_id: int | None, eod_token_id: int | None) -> str:
    if last_id is None:
        return ""
    if eod_token_id is None:
        return f", the last is {last_id}"
    if last_id == eod_token_id:
        return f", ends with the end-of-document id {eod_token_id}"
    return f", ends with {last_id} and not with the end-of-document id {eod_token_id}"


def _describe_outside(glance: _Glance, tokenizer: TokenizerHandle | None) -> str:
    if tokenizer is None:
        return ""
    num_outside = len(glance.first_ids) - len(_select_inside(glance.first_ids, tokenizer))
    if not num_outside:
        return ""
    return (
        f", {num_outside} of the first {len(glance.first_ids)} outside the vocabulary of "
        f"{tokenizer.vocab_size}"
    )


def _select_inside(ids: IntArray, tokenizer: TokenizerHandle) -> IntArray:
    return ids[(ids >= 0) & (ids < tokenizer.vocab_size)]


def _decode(ids: IntArray, tokenizer: TokenizerHandle) -> str:
    return tokenizer.decode(_select_inside(ids, tokenizer).tolist())
