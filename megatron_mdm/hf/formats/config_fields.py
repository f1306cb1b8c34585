"""A foreign model's files, and its config.json read field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.config import ModelConfig
from megatron_mdm.core.errors import ConversionError
from megatron_mdm.hf.formats.tensor_files import TensorFiles, read_json


@dataclass(frozen=True)
class Source:
    """A model's files, and what the user says of them.

    Attributes:
        format_name: The format that they are said to have.
        path: A folder or a .safetensors file.
        files: The same, opened.
        preset: Name of its sizes, where the files leave them open.
        keep_causal: An autoregressive model stays one.
        vocab_size: Ids that it may predict; None: those of the tokenizer beside it.
        vocab_padding_multiple: Rows of the vocabulary are padded to a multiple of this.
    """

    format_name: str
    path: Path
    files: TensorFiles
    preset: str | None = None
    keep_causal: bool = False
    vocab_size: int | None = None
    vocab_padding_multiple: int = 128

    @property
    def config_path(self) -> Path:
        """Where its configuration lies."""
        return self.files.folder / "config.json"


class Fold(NamedTuple):
    """What makes a stored number x a weight: scale x + offset.

    Attributes:
        scale: What the source multiplies with.
        offset: What it adds.
    """

    scale: float = 1.0
    offset: float = 0.0


class Described(NamedTuple):
    """What a model's files say of it.

    Attributes:
        saved: The model; its mask token has the row after the vocabulary's where the files know of
            none.
        eos_token_id: Id that ends a document, if they say.
        folds: By the name of a parameter's row, where its numbers are not stored as they are used.
    """

    saved: SavedModel
    eos_token_id: int | None
    folds: Mapping[str, Fold] = {}


class ConfigFields:
    """The fields of a model's config.json.

    Args:
        path: The file, for messages.
        tree: Its fields; None: they are read.

    Attributes:
        path: The file.
        tree: Its fields.

    Raises:
        ConversionError: The file is missing or holds something else.
    """

    def __init__(self, path: Path, tree: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.tree: Mapping[str, Any] = read_json(path) if tree is None else tree

    def get(self, name: str) -> Any:
        """A field that may be missing, and is None then."""
        return self.tree.get(name)

    def read(self, name: str, kind: type) -> Any:
        """Reads a field.

        Args:
            name: Which.
            kind: `int`, `float` or `bool`; a float may be written as an integer.

        Returns:
            Its value.

        Raises:
            ConversionError: It is missing or of another type.
        """
        value = self.get(name)
        kinds = (int, float) if kind is float else (kind,)
        # A bool is an int to Python.
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            raise ConversionError(f"{self.path} has {name}={value!r}: give it a {kind.__name__}.")
        return value

    def expect(self, expected: Mapping[str, Any], remedy: str) -> None:
        """Refuses a configuration that says something else.

        Args:
            expected: Fields and the only values that will do; None: the field may be missing.
            remedy: What the user can do.

        Raises:
            ConversionError: A field has another value.
        """
        for field, value in expected.items():
            if (found := self.get(field)) != value:
                raise ConversionError(
                    f"{self.path} has {field}={found!r} where {value!r} is needed: {remedy}."
                )


def list_vocabulary_fields(vocab_size: int, rows: int) -> dict[str, int]:
    """Fields of `ModelConfig` for a vocabulary with so many tokens in so many rows."""
    return {"vocab_size": vocab_size} | ({"padded_vocab_size": rows} if rows > vocab_size else {})


def build_model_config(path: Path, **fields: Any) -> ModelConfig:
    """A model's sizes as the `model` section of a run's configuration.

    Args:
        path: Where they were found, for the message.
        **fields: Of the section.

    Returns:
        The section.

    Raises:
        ConversionError: The sizes contradict each other.
    """
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        message = f"{field}: {problem['msg']}" if field else problem["msg"]
        raise ConversionError(f"{path} is not valid ({message}): correct it.") from None
