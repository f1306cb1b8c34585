"""What decides the bytes of shards, compared with shards and unfinished jobs that are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.token_files import TokenFile
from megatron_mdm.corpus.tokenizer import TokenizerHandle
from megatron_mdm.data.manifest import IdsRecipe, Manifest, SourceFile, part_prefix
from megatron_mdm.data.shards import TokenShards, choose_token_dtype, exist_whole

SIDES = ("train", "valid")
# Fields of a manifest that decide the bytes of shards, besides tokenizer and inputs.
_DECISIVE = (
    *("eod_token_id", "text_key", "append_eod", "prepend_eod", "valid_fraction", "task", "ids"),
    *("dtype", "max_tokens"),
)


class Recipe(NamedTuple):
    """What decides the bytes of the shards.

    Attributes:
        tokenizer: The tokenizer.
        manifest: The manifest of shards of this recipe that hold no document yet.
        token_file: The file that the tokens stay in; None where they are written anew.
    """

    tokenizer: TokenizerHandle
    manifest: Manifest
    token_file: TokenFile | None = None

    @classmethod
    def of(
        cls,
        tokenizer: TokenizerHandle,
        sources: Sequence[SourceFile],
        *,
        text_key: str,
        append_eod: bool = True,
        prepend_eod: bool = False,
        max_tokens: int | None = None,
        valid_fraction: float | None = None,
        task: tuple[int, int] | None = None,
        ids: IdsRecipe | None = None,
        token_file: TokenFile | None = None,
    ) -> Recipe:
        """Makes a recipe.

        Args:
            tokenizer: The tokenizer.
            sources: The inputs, in order, with their hashes and what of them is read.
            text_key: The JSON key or column that holds the text.
            append_eod: Whether every document ends with the tokenizer's end-of-document token.
            prepend_eod: Whether every document begins with it.
            max_tokens: Tokens after which no more is read; None: all is read.
            valid_fraction: The share of documents that is held out, None for no division.
            task: The number and the count of the tasks that share the inputs, None for one job.
            ids: How tokens are read that are there already, None for text.
            token_file: The file that the tokens stay in; None where they are written anew.

        Returns:
            The recipe.
        """
        manifest = Manifest(
            tokenizer=tokenizer.name,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eod_token_id=tokenizer.eod_token_id,
            special_tokens=tokenizer.special_tokens,
            num_documents=0,
            num_tokens=0,
            max_token_id=0,
            dtype=_choose_dtype(tokenizer, token_file).name,
            source_files=list(sources),
            text_key=text_key,
            append_eod=append_eod,
            prepend_eod=prepend_eod,
            max_tokens=max_tokens,
            valid_fraction=valid_fraction,
            task=task,
            ids=ids,
        )
        return cls(tokenizer, manifest, token_file)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The integer type of a token in the shards."""
        return np.dtype(self.manifest.dtype)

    def start_manifests(self) -> list[Manifest]:
        """Starts the manifests of the shards.

        Returns:
            One, or with a division two: to train on, and held out.
        """
        if self.manifest.valid_fraction is None:
            return [self.manifest]
        return [self.manifest.model_copy(update={"split": side}) for side in SIDES]

    def find_difference(self, manifest: Manifest, *, skip_bad: bool) -> str | None:
        """Compares with the recipe of shards that exist, or of an unfinished job.

        Args:
            manifest: The manifest of the shards.
            skip_bad: Whether they may lack bad records.

        Returns:
            What differs, in words, or None if the shards are what this recipe gives.
        """
        mine = self.manifest
        if manifest.tokenizer_sha256 != mine.tokenizer_sha256:
            return f"its tokenizer is another ({manifest.tokenizer!r})"
        for name in _DECISIVE:
            if getattr(manifest, name) != getattr(mine, name):
                return f"it has {name}={getattr(manifest, name)!r}, not {getattr(mine, name)!r}"
        if len(manifest.source_files) != len(mine.source_files):
            return f"it was made from {len(manifest.source_files)} input files"
        for file, other in zip(mine.source_files, manifest.source_files, strict=True):
            if not file.has_content_of(other):
                return f"its input {other.path} is not {file.path} as it is now"
        if manifest.num_bad_records and not skip_bad:
            return (
                f"it left out {manifest.num_bad_records} bad records, which takes --on-error skip"
            )
        return None

    def name_prefixes(self, prefix: Path) -> list[Path]:
        """Names the shards.

        Args:
            prefix: The output prefix.

        Returns:
            The path of each pair of shards without `.bin` and `.idx`.
        """
        names, task = [prefix], self.manifest.task
        if self.manifest.valid_fraction is not None:
            names.append(Path(f"{prefix}-valid"))
        return [part_prefix(name, *task) for name in names] if task else names


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
    remedy = "replace it with --overwrite or choose another --output-prefix."
    if not exist_whole(prefixes, remedy, are_referred_to=recipe.token_file is not None):
        return []
    manifests: list[Manifest] = []
    for prefix in prefixes:
        # A part of an array job may be empty.
        manifest = TokenShards.open(prefix, allow_empty=True).manifest
        difference: str | None = "it has no manifest"
        if manifest is not None:
            difference = recipe.find_difference(manifest, skip_bad=skip_bad)
        if manifest is None or difference is not None:
            raise DataError(f"{prefix} exists and {difference}: {remedy}")
        manifests.append(manifest)
    return manifests


def _choose_dtype(tokenizer: TokenizerHandle, token_file: TokenFile | None) -> np.dtype[Any]:
    if token_file is None:
        return choose_token_dtype(tokenizer.vocab_size)
    # Shards know no uint32; ids of a vocabulary are never so large that it matters.
    return np.dtype("<i4") if token_file.dtype == np.dtype("<u4") else token_file.dtype
