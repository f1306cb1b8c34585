"""A model of another format as a source of training parameters."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from megatron_mdm.core.errors import ConversionError
from megatron_mdm.hf.formats.config_fields import Described, Source
from megatron_mdm.hf.formats.tables import FORMATS
from megatron_mdm.hf.formats.tensor_files import TensorFiles
from megatron_mdm.hf.formats.translation import (
    from_format,
    list_external_names,
    list_external_shapes,
)
from megatron_mdm.model.parameters import (
    EMBEDDING,
    OUTPUT_LAYER,
    find_parameter,
    list_parameter_names,
)

# Tensors that the configuration determines; older versions of transformers saved them.
_REDUNDANT = re.compile(r".*rotary_emb\.inv_freq")

# Rows of two tensors that are compared at once.
_CHUNK_ROWS = 4096


class ForeignModel:
    """The weights of a model of another format, or of our own export, under training names.

    A tensor is read when it is asked for, and nothing stays open or mapped between calls.

    Args:
        source: Its files.
        described: What they say of it.

    Attributes:
        format_name: Its format.
        path: Its folder or .safetensors file.
        saved: What the converted model is: its sizes, what it is for, its longest sequence.
        eos_token_id: Id that ends a document, if the source says.
        tokenizer_dir: Folder of its tokenizer.json, if there is one.
        dtype: Of the stored weights; float32 where they differ.

    Raises:
        ConversionError: A tensor is missing, superfluous or of another shape than the sizes say.
    """

    def __init__(self, source: Source, described: Described) -> None:
        self.format_name, self.path = source.format_name, source.path
        self.saved, self.eos_token_id, self._folds = described
        files = source.files
        has_tokenizer = (files.folder / "tokenizer.json").is_file()
        self.tokenizer_dir = files.folder if has_tokenizer else None
        self._files = files
        self._check_headers()
        self._check_tied_head()
        dtypes = {header.dtype for header in files.headers.values()}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32

    @property
    def folder(self) -> Path:
        """Folder of the files."""
        return self._files.folder

    def list_names(self) -> list[str]:
        """Lists the names of all training parameters, in the order of a forward pass."""
        return list_parameter_names(self.saved.model)

    def load(self, name: str) -> Tensor:
        """Builds one training parameter.

        Args:
            name: Name in a training checkpoint.

        Returns:
            float32, whole and in memory of its own, in Megatron's layout. Padding rows of the
            vocabulary are 0; see `formats.make_new_row` for a mask token that the source does not
            have.

        Raises:
            ConversionError: The model has no such parameter.
        """
        whole = from_format(self.format_name, name, self._files.read, self.saved)
        fold = self._folds.get(find_parameter(name).name)
        return whole if fold is None else whole.mul_(fold.scale).add_(fold.offset)

    def load_external(self, external_name: str) -> Tensor:
        """Reads one tensor as the source has it, under its name there, in float32."""
        num_rows = self._files.headers[external_name].shape[0]
        return self._files.read(external_name, 0, num_rows)

    def _check_headers(self) -> None:
        expected = dict(
            pair
            for name in self.list_names()
            for pair in list_external_shapes(self.format_name, name, self.saved)
        )
        found = self._files.list_shapes()
        missing = [name for name in expected if name not in found]
        extra = [name for name in found if name not in expected and not self._is_redundant(name)]
        wrong = [name for name in expected if found.get(name, expected[name]) != expected[name]]
        problems = [
            f"{verb} {names[0]}{f' ({len(names)} such in all)' if len(names) > 1 else ''}"
            for verb, names in (("lacks", missing), ("has the extra", extra))
            if names
        ]
        if wrong:
            name = wrong[0]
            problems.append(
                f"has {name} in the shape {list(found[name])} where {list(expected[name])} is "
                f"expected ({len(wrong)} such in all)"
            )
        if problems:
            model = self.saved.model
            raise ConversionError(
                f"{self.path} {', '.join(problems)}: give a whole {self.format_name} model of "
                f"{model.num_layers} layers and width {model.hidden_size}, or choose the format "
                "that it has."
            )

    def _is_redundant(self, name: str) -> bool:
        (head,) = list_external_names(self.format_name, OUTPUT_LAYER)
        is_head = name == head and self.saved.model.tie_embeddings
        return is_head or _REDUNDANT.fullmatch(name) is not None

    def _check_tied_head(self) -> None:
        """Accepts a second copy of a tied head; refuses a different head, which would be lost."""
        (name,) = list_external_names(self.format_name, OUTPUT_LAYER)
        (embedding_name,) = list_external_names(self.format_name, EMBEDDING)
        headers = self._files.headers
        if not self.saved.model.tie_embeddings or name not in headers:
            return
        num_rows = headers[embedding_name].shape[0]
        is_same = headers[name].shape == headers[embedding_name].shape and all(
            torch.equal(
                self._files.read(name, start, min(start + _CHUNK_ROWS, num_rows)),
                self._files.read(embedding_name, start, min(start + _CHUNK_ROWS, num_rows)),
            )
            for start in range(0, num_rows, _CHUNK_ROWS)
        )
        if not is_same:
            raise ConversionError(
                f"{self.path} holds {name} other than {embedding_name}, but its config.json says "
                "that they are tied: correct config.json."
            )


def open_foreign(
    format_name: str,
    path: Path,
    *,
    preset: str | None = None,
    keep_causal: bool = False,
    vocab_padding_multiple: int = 128,
    vocab_size: int | None = None,
) -> ForeignModel:
    """Opens a model of another format, or our own export, and checks it by its headers alone.

    Args:
        format_name: A key of `FORMATS`. `llama`, `qwen2` and `qwen3` are autoregressive models of
            transformers that a masked-diffusion model is to start from.
        path: Its folder or .safetensors file, beside which its config.json lies.
        preset: For `smdm`, the name of its sizes if their shapes leave it open.
        keep_causal: For `llama`, `qwen2` and `qwen3`: the model stays autoregressive.
        vocab_padding_multiple: Rows of the vocabulary are padded to a multiple of this.
        vocab_size: For `llada`, `llama`, `qwen2` and `qwen3`: ids that it may predict, of all the
            rows that its vocabulary has; None: those of the tokenizer beside it.

    Returns:
        The model, ready to be read tensor by tensor.

    Raises:
        ConversionError: It is not there, not whole, not of the format, or has what our model
            cannot express.
    """
    if format_name not in FORMATS:
        raise ConversionError(
            f"The format {format_name!r} does not exist: choose one of {', '.join(FORMATS)}."
        )
    options = {"preset": preset, "keep_causal": keep_causal or None, "vocab_size": vocab_size}
    for name, value in options.items():
        if value is not None and name not in FORMATS[format_name].options:
            owners = [other for other, format_ in FORMATS.items() if name in format_.options]
            raise ConversionError(
                f"{name}={value} belongs to the formats {', '.join(owners)}, but the format is "
                f"{format_name}: leave it out."
            )
    files = TensorFiles(path)
    source = Source(
        format_name, path, files, preset, keep_causal, vocab_size, vocab_padding_multiple
    )
    return ForeignModel(source, FORMATS[format_name].describe(source))
