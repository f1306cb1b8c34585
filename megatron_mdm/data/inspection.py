"""What shards and views hold, in words and bars of text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.tables import format_table
from megatron_mdm.data.manifest import Manifest
from megatron_mdm.data.source import IntArray, split_range
from megatron_mdm.data.store import TokenStore

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
_BAR_CHARACTERS = 40
_PARTS_SHOWN = 4


def report_store(source: TokenStore, sample: str | None = None) -> Iterator[str]:
    """Describes shards or a view, and checks them.

    Args:
        source: The shards or the view.
        sample: Some of its text, decoded, to show as well.

    Yields:
        Lines of text. The last one comes after all checks.

    Raises:
        DataError: The index, the extents or a token id is wrong.
    """
    yield f"documents   {source.num_documents}"
    yield f"tokens      {source.num_tokens}"
    yield f"dtype       {source.dtype.name}"
    yield from _tell_origin(source)
    # What follows trusts the index.
    source.verify()
    lengths = source.document_lengths
    if len(lengths):
        quantiles = np.quantile(lengths, _QUANTILES)
        told = ", ".join(f"{q:.0%} {n:.0f}" for q, n in zip(_QUANTILES, quantiles, strict=True))
        yield f"lengths     {told} tokens"
        yield from draw_histogram(lengths)
    if source.manifest is None:
        yield "vocabulary  unknown: there is no manifest"
    else:
        yield from _tell_manifest(source.manifest)
    _check_ids(source, lengths)
    if sample is not None:
        yield f"sample      {sample}"
    yield "integrity   OK"


def draw_histogram(lengths: IntArray) -> list[str]:
    """Draws a histogram of document lengths; each bin is twice as wide as the one before it.

    Args:
        lengths: Tokens of each document, int64 [documents], at least one document.

    Returns:
        A line of heads, then one for each bin from the first to the last that is not empty.
    """
    counts = np.zeros(33, dtype=np.int64)
    for start, stop in split_range(len(lengths)):
        # Bin 0 holds length 0, and bin b the lengths of b binary digits.
        bins = np.frexp(lengths[start:stop].astype(np.float64))[1]
        counts += np.bincount(bins, minlength=len(counts))
    filled = np.flatnonzero(counts)
    rows = []
    for number in range(int(filled[0]), int(filled[-1]) + 1):
        low, high = (1 << number) >> 1, max((1 << number) - 1, 0)
        count = int(counts[number])
        # Rounded up, so that a bin that is not empty shows.
        bar = "#" * -(-_BAR_CHARACTERS * count // int(counts.max()))
        rows.append((str(low) if low == high else f"{low}-{high}", str(count), bar))
    return format_table(("tokens", "documents", ""), rows, left=(2,))


def _tell_origin(source: TokenStore) -> Iterator[str]:
    view, recipe = source.view, source.subset
    if view is not None:
        yield f"view        {view.made_by} of {len(view.parts)} pairs of shards"
        for part in view.parts[:_PARTS_SHOWN]:
            path = Path(source.prefix.parent, part.path)
            yield f"            {path}: {part.num_documents} documents, {part.num_tokens} tokens"
        if len(view.parts) > _PARTS_SHOWN:
            yield f"            and {len(view.parts) - _PARTS_SHOWN} more"
    if recipe is not None:
        yield f"subset of   {recipe.describe()}"


def _tell_manifest(manifest: Manifest) -> Iterator[str]:
    mark = "beginning" if manifest.prepend_eod else "end"
    yield (
        f"vocabulary  {manifest.vocab_size} tokens of {manifest.tokenizer}, largest id used "
        f"{manifest.max_token_id}, {mark} of document {manifest.eod_token_id}"
    )
    if manifest.split is not None and manifest.valid_fraction is not None:
        yield f"split       {manifest.split}, with {manifest.valid_fraction:.2%} held out"
    if manifest.num_skipped_documents or manifest.num_bad_records:
        yield (
            f"left out    {manifest.num_skipped_documents} documents without text, "
            f"{manifest.num_bad_records} bad records"
        )


def _check_ids(source: TokenStore, lengths: IntArray) -> None:
    manifest = source.manifest
    limit = np.iinfo(np.int64).max if manifest is None else manifest.vocab_size
    # No unsigned type holds an id that no vocabulary could have.
    if manifest is None and source.dtype.kind == "u":
        return
    outside = source.find_token_outside(limit)
    if outside is None:
        return
    position, token_id = outside
    ends = lengths.cumsum(dtype=np.int64)
    document = int(np.searchsorted(ends, position, side="right"))
    place = position - int(ends[document] - lengths[document])
    rule = (
        "and ids begin at 0"
        if token_id < 0 or manifest is None
        else f"outside its vocabulary of {manifest.vocab_size}"
    )
    raise DataError(
        f"{source.prefix} has token id {token_id} at position {position}, place {place} of "
        f"document {document}, {rule}: write the shards again with --overwrite."
    )
