"""Subsets: documents in random or stored order, up to a number of tokens, referred to or copied."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import write_errors
from megatron_mdm.data.extents import extents_path
from megatron_mdm.data.manifest import Manifest, SubsetRecipe
from megatron_mdm.data.order import Permutation
from megatron_mdm.data.references import ViewPart, ViewRecord
from megatron_mdm.data.shards import shard_paths
from megatron_mdm.data.source import IntArray
from megatron_mdm.data.store import TokenStore, open_tokens
from megatron_mdm.data.view_writer import ExtentsWriter, write_extents, write_view
from megatron_mdm.data.writer import ShardWriter

_LOG = logging.getLogger(__name__)
_CHUNK_DOCUMENTS = 1 << 16
_BYTES_PER_EXTENT = 24
# Keeps these keys apart from those of sample orders and noise, which may hash the same seed.
_DOMAIN = 0x5B5E7


def make_subset(
    source_prefix: Path,
    output_prefix: Path,
    num_tokens: int,
    seed: int | None,
    copy: bool = False,
    overwrite: bool = False,
    num_skipped_tokens: int = 0,
) -> TokenStore:
    """Takes documents in a seeded random order until there are exactly `num_tokens` tokens.

    The last document is cut. Subsets of one parent and seed are nested: the stream of the smaller
    is a prefix of that of the larger. Documents without tokens are left out. A subset that the same
    request made is reused.

    What is skipped is a smaller subset with all of its last document: no document is in both.

    Args:
        source_prefix: The parent, shards or a view, without extension.
        output_prefix: The subset's path without extension.
        num_tokens: The tokens to take, at least 1.
        seed: Decides the order, 0 or more; None: documents stay in the parent's order.
        copy: Whether to write shards of its own instead of a view of the parent's.
        overwrite: Whether to replace what something else made at that path.
        num_skipped_tokens: Leave out the documents that hold the first so many tokens of the order.

    Returns:
        The subset, open.

    Raises:
        DataError: The parent does not open or has too few tokens, an argument is wrong, something
            else lies at the output, or it cannot be written.
    """
    source = open_tokens(source_prefix)
    _check_request(source, output_prefix, num_tokens, seed, num_skipped_tokens)
    recipe = SubsetRecipe(
        source=str(source_prefix),
        source_fingerprint=source.fingerprint(),
        num_tokens=num_tokens,
        seed=seed,
        num_skipped_tokens=num_skipped_tokens,
    )
    existing = None if overwrite else _find_reusable(output_prefix, recipe, copy)
    if existing is not None:
        _LOG.info("reusing %s: the same request made it", output_prefix)
        return existing
    with write_errors(output_prefix):
        output_prefix.parent.mkdir(parents=True, exist_ok=True)
        if copy:
            _copy(source, output_prefix, recipe)
        else:
            _refer(source, output_prefix, recipe)
    return open_tokens(output_prefix)


def name_subset(num_tokens: int) -> str:
    """Names a size: exact billions, millions and thousands get B, M and K.

    Args:
        num_tokens: The tokens, at least 1.

    Returns:
        Such as "25M", or the plain number.
    """
    for factor, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if num_tokens % factor == 0:
            return f"{num_tokens // factor}{letter}"
    return str(num_tokens)


def _check_request(
    source: TokenStore, output: Path, num_tokens: int, seed: int | None, num_skipped: int
) -> None:
    if num_tokens < 1:
        raise DataError(f"--tokens={num_tokens} has to be at least 1: ask for more.")
    if seed is not None and seed < 0:
        raise DataError(f"--seed={seed} has to be at least 0: choose another.")
    if num_skipped < 0:
        raise DataError(f"--skip-tokens={num_skipped} has to be at least 0: choose another.")
    missing = num_tokens + num_skipped - source.num_tokens
    if missing > 0:
        skipped = f" and --skip-tokens={num_skipped}" if num_skipped else ""
        raise DataError(
            f"--tokens={num_tokens}{skipped} is more than the {source.num_tokens} tokens of "
            f"{source.prefix}, {missing} are missing: ask for fewer or preprocess more text."
        )
    mine = {part.prefix.resolve() for part in (source, *source.parts)}
    if output.resolve() in mine:
        raise DataError(
            f"--output-prefix={output} is what the subset is taken from: choose another path."
        )


def _find_reusable(prefix: Path, recipe: SubsetRecipe, copy: bool) -> TokenStore | None:
    if not any(path.exists() for path in shard_paths(prefix)):
        return None
    remedy = "replace it with --overwrite or choose another --output-prefix."
    try:
        existing = open_tokens(prefix)
    except DataError as error:
        raise DataError(f"{prefix} exists and does not open ({error}): {remedy}") from error
    if (existing.view is None) != copy:
        raise DataError(f"{prefix} exists and is {'a copy' if not copy else 'a view'}: {remedy}")
    made = existing.subset
    if made is None:
        raise DataError(f"{prefix} exists and does not say that it is a subset: {remedy}")
    if made.model_copy(update={"source": recipe.source}) != recipe:
        raise DataError(
            f"{prefix} exists and is the subset of {made.describe()}, of which the content, the "
            f"size, the seed or what is skipped differs: {remedy}"
        )
    return existing


def _select(source: TokenStore, recipe: SubsetRecipe) -> Iterator[IntArray]:
    """Yields the documents to take, as `locate_documents` gives them, the last one cut."""
    num_left, num_skipped = recipe.num_tokens, recipe.num_skipped_tokens
    for start in range(0, source.num_documents, _CHUNK_DOCUMENTS):
        stop = min(start + _CHUNK_DOCUMENTS, source.num_documents)
        number_N = np.arange(start, stop)
        if recipe.seed is not None:
            number_N = Permutation(source.num_documents, (recipe.seed, _DOMAIN))(number_N)
        located_N3 = source.locate_documents(number_N)
        located_N3 = located_N3[located_N3[:, 2] > 0]
        if num_skipped > 0:
            # With all of the document that holds the last token to be skipped.
            ends = located_N3[:, 2].cumsum()
            located_N3 = located_N3[int(np.searchsorted(ends, num_skipped)) + 1 :]
            num_skipped -= int(ends[-1]) if len(ends) else 0
        ends = located_N3[:, 2].cumsum()
        last = int(np.searchsorted(ends, num_left))
        if last < len(ends):
            located_N3[last, 2] -= ends[last] - num_left
            yield located_N3[: last + 1]
            return
        num_left -= int(ends[-1]) if len(ends) else 0
        yield located_N3
    if recipe.num_skipped_tokens:
        raise DataError(
            f"{source.prefix}: behind the document that holds the last of --skip-tokens="
            f"{recipe.num_skipped_tokens}, {num_left} of --tokens={recipe.num_tokens} are missing: "
            "ask for fewer or preprocess more text."
        )
    raise DataError(
        f"{source.prefix} is damaged: its documents hold {recipe.num_tokens - num_left} tokens "
        f"instead of {source.num_tokens}: check it with mdm inspect."
    )


def _make_manifest(
    source: TokenStore, recipe: SubsetRecipe, taken: ShardWriter | ExtentsWriter
) -> Manifest | None:
    """The manifest of documents that were taken."""
    if source.manifest is None:
        return None
    update = {
        "num_documents": taken.num_documents,
        "num_tokens": taken.num_tokens,
        "subset": recipe,
    }
    return source.manifest.model_copy(update=update)


def _refer(source: TokenStore, prefix: Path, recipe: SubsetRecipe) -> None:
    parts = [ViewPart.of(part, prefix.parent) for part in source.parts]
    with write_extents(extents_path(prefix)) as writer:
        for located_N3 in _select(source, recipe):
            writer.append(located_N3)
        # Removed before the new extents appear, so that no older view is read with them.
        for path in shard_paths(prefix):
            path.unlink(missing_ok=True)
    view = ViewRecord(
        made_by="subset",
        num_documents=writer.num_documents,
        num_tokens=writer.num_tokens,
        dtype=source.dtype.name,
        parts=parts,
        extents_sha256=writer.sha256(),
        subset=recipe,
        manifest=_make_manifest(source, recipe, writer),
    )
    write_view(prefix, view)
    extent_bytes = writer.num_documents * _BYTES_PER_EXTENT
    token_bytes = writer.num_tokens * source.dtype.itemsize
    if extent_bytes > token_bytes:
        _LOG.info(
            "%s: its documents are so short that the references take %d bytes and the tokens "
            "themselves %d: --copy makes it smaller and faster to read",
            prefix,
            extent_bytes,
            token_bytes,
        )


def _copy(source: TokenStore, prefix: Path, recipe: SubsetRecipe) -> None:
    with ShardWriter(prefix, source.dtype) as writer:
        for located_N3 in _select(source, recipe):
            for part, start, length in located_N3.tolist():
                writer.append_stored(source.parts[part], start, [length])
        writer.finish(_make_manifest(source, recipe, writer))
