"""Preprocessing: from text or tokens to token shards with a manifest, over processes and tasks."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.inputs import open_sources, take_share
from megatron_mdm.corpus.job import Job, Preprocessed
from megatron_mdm.corpus.options import PreprocessOptions
from megatron_mdm.corpus.sources import HubDataset, SourceShare, Span
from megatron_mdm.corpus.token_files import TokenFile
from megatron_mdm.corpus.token_inputs import can_stay, hold_tokens, open_streams, open_token_files
from megatron_mdm.corpus.tokenizer import TokenizerHandle, load_tokenizer
from megatron_mdm.data.manifest import IdsRecipe, part_prefix
from megatron_mdm.data.merge import merge_parts

__all__ = ["Preprocessed", "preprocess"]

_LOG = logging.getLogger(__name__)
# What instruction-tuned models name as their end of a sequence, and what base models do.
_TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<|return|>", "<|eot_id|>", "<|end|>")
_TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>")


def preprocess(
    inputs: Sequence[Path] | HubDataset,
    tokenizer_name: str,
    output_prefix: Path,
    options: PreprocessOptions | None = None,
) -> Preprocessed:
    """Writes token shards and their manifest, or reuses those that the same inputs made.

    Documents keep the order of the inputs; the bytes are equal for any number of workers, and
    those of all tasks in a row are equal to those of one job. Tokens that lie in files in a type
    that shards can hold stay there: an index and a reference are written.

    Args:
        inputs: The files and folders to read, at least one, or a hub data set.
        tokenizer_name: A tokenizer's name or path, as `load_tokenizer` takes it.
        output_prefix: The path of the shards without `.bin` and `.idx`. Held-out documents go to
            the same path with `-valid` after it, and an array task writes into PREFIX.parts.
        options: How to do it; None for the defaults.

    Returns:
        The manifests, which are written last.

    Raises:
        DataError: The inputs, the tokenizer or the output cannot be used, other shards exist
            there, a side of the division is empty, or the disk is full. An unfinished job stays
            in PREFIX.partial if it got anywhere.
    """
    options = options or PreprocessOptions()
    options.check()
    if not isinstance(inputs, HubDataset) and hold_tokens(inputs, options):
        tokenizer = _load_tokenizer(tokenizer_name, options)
        return _preprocess_files(inputs, tokenizer, output_prefix, options)
    sources = open_sources(inputs, options.key, options.split)
    if options.task is not None and isinstance(inputs, HubDataset):
        raise DataError(
            f"--dataset={inputs.name} is a stream and cannot be shared by tasks: save it to a "
            "folder with datasets.save_to_disk and give that as --input."
        )
    tokenizer = _load_tokenizer(tokenizer_name, options)
    ids = None
    if options.ids_key is not None:
        options.refuse_for_tokens()
        ids = IdsRecipe(
            key=options.ids_key,
            split_at_eod=bool(options.split_at_eod),
            hold_out_by=options.hold_out_by,
        )
    shares = take_share(sources, *(options.task or (0, 1)))
    return Job(shares, tokenizer, output_prefix, options, ids).run()


def _preprocess_files(
    inputs: Sequence[Path],
    tokenizer: TokenizerHandle,
    output_prefix: Path,
    options: PreprocessOptions,
) -> Preprocessed:
    options.refuse_for_tokens()
    files = open_token_files(inputs, tokenizer, options)
    for file in files:
        _LOG.info("%s", file.describe())
    stays, reason = can_stay(files, options)
    if stays:
        _LOG.info("the tokens stay where they are; --copy writes them anew")
        return _index_in_place(files, tokenizer, output_prefix, options)
    if reason:
        _LOG.info("the tokens are copied: %s", reason)
    sources = open_streams(files, tokenizer, options, is_copied=True)
    shares = take_share(sources, *(options.task or (0, 1)))
    ids = _make_ids_recipe(files, options)
    return Job(shares, tokenizer, output_prefix, options, ids).run()


def _index_in_place(
    files: list[TokenFile],
    tokenizer: TokenizerHandle,
    output_prefix: Path,
    options: PreprocessOptions,
) -> Preprocessed:
    """Indexes files where they are: one as PREFIX, several as parts of a view."""
    made, ids = [], _make_ids_recipe(files, options)
    for number, file in enumerate(files):
        (source,) = open_streams([file], tokenizer, options, is_copied=False)
        shares = [SourceShare(source, Span())]
        name = part_prefix(output_prefix, number, len(files)) if len(files) > 1 else output_prefix
        # Only documents of the first file are shown: one corpus has one tokenizer.
        shown = options if number == 0 else dataclasses.replace(options, show=0)
        made.append(Job(shares, tokenizer, name, shown, ids, file).run())
    if len(files) == 1:
        return made[0]
    whole = merge_parts(output_prefix, overwrite=options.overwrite)
    if whole.manifest is None:
        raise DataError(f"{output_prefix} has no manifest: run again with --overwrite.")
    num_tokens = sum(one.num_tokens for one in made)
    num_bytes = sum(one.num_bytes for one in made)
    return Preprocessed([whole.manifest], [output_prefix], None, num_tokens, num_bytes)


def _load_tokenizer(name: str, options: PreprocessOptions) -> TokenizerHandle:
    tokenizer = load_tokenizer(name, options.eod_token)
    _LOG.info("documents end with %r (id %d)", tokenizer.eod_token, tokenizer.eod_token_id)
    ends = [token for token in _TEXT_ENDS if token in tokenizer.special_tokens]
    if options.eod_token is None and tokenizer.eod_token in _TURN_ENDS and ends:
        _LOG.warning(
            "%r ends turns of a chat; texts of this tokenizer end with %r: consider --eod-token %r",
            tokenizer.eod_token,
            ends[0],
            ends[0],
        )
    return tokenizer


def _make_ids_recipe(files: Sequence[TokenFile], options: PreprocessOptions) -> IdsRecipe:
    is_cut = files[0].format != "datatrove" and options.split_at_eod is not False
    return IdsRecipe(key=None, split_at_eod=is_cut, hold_out_by=options.hold_out_by)
