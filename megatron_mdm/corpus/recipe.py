"""What decides the bytes of shards, compared with shards and unfinished jobs that are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.token_files import TokenFile
from megatron_mdm.corpus.tokenizer import TokenizerHandle
from megatron_mdm.data.manifest import IdsRecipe, Manifest, SourceFile, manifest_path, part_prefix
from megatron_mdm.data.references import reference_path
from megatron_mdm.data.shards import TokenShards, bin_path, idx_path, shard_paths, token_dtype

SIDES = ("train", "valid")


class Recipe(NamedTuple):
    """What decides the bytes of the shards.

    Attributes:
        tokenizer: The tokenizer.
        sources: The inputs, in order, with their hashes and what of them is read.
        text_key: The JSON key or column that holds the text.
        append_eod: Whether every document ends with the tokenizer's end-of-document token.
        valid_fraction: The share of documents that is held out, None for no division.
        task: The number and the count of the tasks that share the inputs, None for one job.
        ids: How tokens are read that are there already, None for text.
        token_file: The file that the tokens stay in; None where they are written anew.
    """

    tokenizer: TokenizerHandle
    sources: list[SourceFile]
    text_key: str
    append_eod: bool
    valid_fraction: float | None = None
    task: tuple[int, int] | None = None
    ids: IdsRecipe | None = None
    token_file: TokenFile | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The integer type of a token in the shards."""
        if self.token_file is None:
            return token_dtype(self.tokenizer.vocab_size)
        # Shards know no uint32; ids of a vocabulary are never so large that it matters.
        is_wide = self.token_file.dtype == np.dtype("<u4")
        return np.dtype("<i4") if is_wide else self.token_file.dtype

    def empty_manifests(self) -> list[Manifest]:
        """Starts the manifests of the shards.

        Returns:
            One, or with a division two: to train on, and held out.
        """
        tokenizer = self.tokenizer
        manifest = Manifest(
            tokenizer=tokenizer.name,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eod_token_id=tokenizer.eod_token_id,
            special_tokens=tokenizer.special_tokens,
            num_documents=0,
            num_tokens=0,
            max_token_id=0,
            dtype=self.dtype.name,
            source_files=self.sources,
            text_key=self.text_key,
            append_eod=self.append_eod,
            valid_fraction=self.valid_fraction,
            task=self.task,
            ids=self.ids,
        )
        if self.valid_fraction is None:
            return [manifest]
        return [manifest.model_copy(update={"split": side}) for side in SIDES]

    def difference_from(self, manifest: Manifest) -> str | None:
        """Compares with the recipe of shards that exist.

        Args:
            manifest: The manifest of the shards.

        Returns:
            What differs, in words, or None if the shards are what this recipe gives.
        """
        if manifest.tokenizer_sha256 != self.tokenizer.sha256:
            return f"its tokenizer is another ({manifest.tokenizer!r})"
        if manifest.eod_token_id != self.tokenizer.eod_token_id:
            return f"its end-of-document id is {manifest.eod_token_id}"
        if (manifest.text_key, manifest.append_eod) != (self.text_key, self.append_eod):
            return f"it has text_key={manifest.text_key!r}, append_eod={manifest.append_eod}"
        if (manifest.valid_fraction, manifest.task) != (self.valid_fraction, self.task):
            return f"it has valid_fraction={manifest.valid_fraction}, task={manifest.task}"
        if manifest.ids != self.ids:
            return f"it has ids={manifest.ids}"
        if manifest.dtype != self.dtype.name:
            return f"its tokens are {manifest.dtype} and these would be {self.dtype.name}"
        if len(manifest.source_files) != len(self.sources):
            return f"it was made from {len(manifest.source_files)} input files"
        for mine, other in zip(self.sources, manifest.source_files, strict=True):
            if not mine.has_content_of(other):
                return f"its input {other.path} is not {mine.path} as it is now"
        return None

    def prefixes(self, prefix: Path) -> list[Path]:
        """Names the shards.

        Args:
            prefix: The output prefix.

        Returns:
            The path of each pair of shards without `.bin` and `.idx`.
        """
        names = [prefix] if self.valid_fraction is None else [prefix, Path(f"{prefix}-valid")]
        return [part_prefix(name, *self.task) for name in names] if self.task else names


def find_reusable(prefixes: Sequence[Path], recipe: Recipe, *, skip_bad: bool) -> list[Manifest]:
    """Looks for shards that the recipe gives.

    Args:
        prefixes: The path of each pair of shards without `.bin` and `.idx`.
        recipe: The recipe.
        skip_bad: Whether shards may lack bad records.

    Returns:
        Their manifests; none if nothing is there.

    Raises:
        DataError: Something else is there.
    """
    tokens_path = bin_path if recipe.token_file is None else reference_path
    paths = [
        path
        for prefix in prefixes
        for path in (tokens_path(prefix), idx_path(prefix), manifest_path(prefix))
    ]
    existing = [path for prefix in prefixes for path in shard_paths(prefix) if path.exists()]
    if not existing:
        return []
    if sorted(existing) != sorted(paths):
        raise DataError(
            f"{existing[0]} exists without the files that belong to it: replace it with "
            "--overwrite or choose another --output-prefix."
        )
    manifests = []
    for prefix in prefixes:
        # A part of an array job may be empty.
        manifest = TokenShards.open(prefix, allow_empty=True).manifest
        difference = recipe.difference_from(manifest) if manifest else "it has no manifest"
        if manifest and not difference and manifest.num_bad_records and not skip_bad:
            difference = f"it left out {manifest.num_bad_records} bad records"
        if difference or manifest is None:
            raise DataError(
                f"{prefix} exists and {difference}: replace it with --overwrite or choose another "
                "--output-prefix."
            )
        manifests.append(manifest)
    return manifests
