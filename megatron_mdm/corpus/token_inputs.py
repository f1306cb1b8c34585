"""What a user names as files of tokens, opened as sources."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from megatron_mdm.core.errors import DataError, unreadable_error
from megatron_mdm.corpus.inputs import TOKEN_EXTENSIONS
from megatron_mdm.corpus.options import PreprocessOptions
from megatron_mdm.corpus.sources import Source
from megatron_mdm.corpus.token_files import TokenFile, open_token_file
from megatron_mdm.corpus.token_sources import KnownDocuments, StreamSource
from megatron_mdm.corpus.tokenizer import TokenizerHandle

_READABLE_DTYPES = {np.dtype("<u2"), np.dtype("<i4"), np.dtype("<u4")}


def hold_tokens(inputs: Sequence[Path], options: PreprocessOptions) -> bool:
    """Tells whether inputs are files of tokens, by their extensions or because a format was told.

    Args:
        inputs: Files and folders.
        options: How to read them.

    Returns:
        Whether all of them are.

    Raises:
        DataError: Some are and some are not, or there are options that do not go with them.
    """
    if options.format is not None:
        are = [True] * len(inputs)
    else:
        are = [path.suffix.lower() in TOKEN_EXTENSIONS and not path.is_dir() for path in inputs]
    if any(are) and options.ids_key is not None:
        raise DataError(
            f"--ids-key={options.ids_key} names a column and {inputs[are.index(True)]} is a file "
            "of tokens, which has none: leave it out."
        )
    if not any(are):
        _check_without_files(options)
    if any(are) and not all(are):
        raise DataError(
            f"{inputs[are.index(True)]} is a file of tokens and {inputs[are.index(False)]} is not: "
            "preprocess them one by one and name both in data.train."
        )
    return any(are)


def _check_without_files(options: PreprocessOptions) -> None:
    """Refuses options of files of tokens, and those of ids where there is text."""
    of_files = {"--dtype": options.dtype is not None, "--copy": options.copy}
    of_ids = {
        "--split-at-eod": options.split_at_eod is not None,
        "--hold-out-by": options.hold_out_by != "ids",
    }
    for name in (name for name, is_given in of_files.items() if is_given):
        raise DataError(f"{name} is for files of tokens and the input is none: leave it out.")
    if options.ids_key is None:
        for name in (name for name, is_given in of_ids.items() if is_given):
            raise DataError(
                f"{name} is for tokens and the input is text: leave it out, or name a column of "
                "token ids with --ids-key."
            )


def open_token_files(
    inputs: Sequence[Path], tokenizer: TokenizerHandle, options: PreprocessOptions
) -> list[TokenFile]:
    """Recognises files of tokens.

    Args:
        inputs: The files, at least one.
        tokenizer: What made the tokens.
        options: How to read them.

    Returns:
        Those that hold tokens, in order.

    Raises:
        DataError: One is missing, damaged, or of an unknown format; or none holds tokens.
    """
    files = []
    for path in inputs:
        if not path.is_file():
            raise DataError(f"{path} is not a file: give an existing file as input.")
        try:
            files.append(open_token_file(path, tokenizer, options.format, options.dtype))
        except OSError as error:
            raise unreadable_error(path, error) from error
    filled = [file for file in files if file.num_tokens]
    if not filled:
        raise DataError(f"{inputs[0]} holds no tokens: give a file with at least one document.")
    return filled


def can_stay(files: Sequence[TokenFile], options: PreprocessOptions) -> tuple[bool, str]:
    """Tells whether shards can refer to files instead of holding their tokens.

    Args:
        files: The files.
        options: What is to be done with them.

    Returns:
        Whether, and if not why, in words; "" if a copy was asked for.
    """
    if options.copy:
        return False, ""
    if options.valid_fraction is not None:
        return False, "documents are held out, so what is left does not lie in a row"
    if options.task is not None:
        return False, "several tasks share the files"
    if options.split_at_eod is False:
        return False, "each document gets an end"
    for file in files:
        if file.dtype not in _READABLE_DTYPES:
            return False, f"{file.path} holds {file.dtype.str}, and shards uint16 or int32"
    if len({file.dtype.itemsize for file in files}) > 1:
        return False, "the files are of different types"
    return True, ""


def open_streams(
    files: Sequence[TokenFile],
    tokenizer: TokenizerHandle,
    options: PreprocessOptions,
    *,
    is_copied: bool,
) -> list[Source]:
    """Opens files of tokens as sources; files of one stream become one source.

    Args:
        files: The files, at least one.
        tokenizer: What made the tokens.
        options: How to read them.
        is_copied: Whether the tokens are written anew.

    Returns:
        The sources, in order.

    Raises:
        DataError: Some of the files say where documents end and others do not.
    """
    if len({file.format == "datatrove" for file in files}) > 1:
        raise DataError(
            f"{files[0].path} and the files after it differ: some have an index of documents "
            "beside them (.ds.index); preprocess them one by one."
        )
    if files[0].format == "datatrove" or options.split_at_eod is False:
        return [KnownDocuments(file) for file in files]
    return [
        StreamSource(list(group), tokenizer, is_copied=is_copied)
        for _, group in groupby(files, key=lambda file: file.dtype)
    ]
