"""The safetensors files of a model folder, known by their headers and read by rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_mdm.core.errors import ConversionError

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Pickles, which run code when they are loaded.
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as its file's header describes it.

    Attributes:
        file: Where it is.
        dtype: float32, float16 or bfloat16.
        shape: Sizes.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFiles:
    """Tensors of one file or of a folder; nothing stays open or mapped between calls.

    Args:
        path: A .safetensors file, or a folder with model.safetensors or its index.

    Raises:
        ConversionError: There is no such file, it is damaged, or it holds other than safetensors
            or floating-point numbers.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path if path.is_dir() else path.parent
        self.headers: dict[str, TensorHeader] = {}
        for file in _list_files(path):
            for name, header in _read_headers(file).items():
                if name in self.headers:
                    raise ConversionError(
                        f"{file} holds {name}, and so does {self.headers[name].file}: leave one "
                        "of them out."
                    )
                self.headers[name] = header

    def list_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return {name: header.shape for name, header in self.headers.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Reads rows of a tensor.

        Args:
            name: A name among the headers.
            start: First row.
            stop: Row after the last.

        Returns:
            float32 in memory of its own.
        """
        with safe_open(self.headers[name].file, framework="pt") as handle:
            return handle.get_slice(name)[start:stop].to(torch.float32, copy=True)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: Its file.

    Returns:
        The object.

    Raises:
        ConversionError: The file is missing or holds something else.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(
            f"{path} is missing: give a model folder with its {path.name}."
        ) from None
    except ValueError as error:
        raise ConversionError(f"{path} is no JSON ({error}): fetch it again.") from None
    if not isinstance(tree, dict):
        raise ConversionError(f"{path} holds no JSON object: fetch it again.")
    return tree


def _list_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise _make_format_error(path)
        return [path]
    if not path.is_dir():
        raise ConversionError(
            f"{path} does not exist: download the model and give its folder or .safetensors file."
        )
    if (path / _WEIGHTS).is_file():
        return [path / _WEIGHTS]
    if (path / _INDEX).is_file():
        return _list_indexed_files(path)
    pickles = sorted(file for file in path.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise _make_format_error(pickles[0])
    raise ConversionError(
        f"{path} has neither {_WEIGHTS} nor {_INDEX}: give another folder, or the .safetensors "
        "file itself."
    )


def _make_format_error(path: Path) -> ConversionError:
    return ConversionError(
        f"{path} is no .safetensors file, and other formats can run code when they are loaded: "
        "save the model as safetensors where it was made (save_pretrained does) and give that."
    )


def _list_indexed_files(folder: Path) -> list[Path]:
    places = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ConversionError(f"{folder / _INDEX} has no weight_map: fetch it again.")
    files = []
    for name in sorted({str(place) for place in places.values()}):
        # A plain name: an index must not reach into other folders.
        if Path(name).name != name or not (folder / name).is_file():
            raise ConversionError(
                f"{folder / _INDEX} names {name}, which is not in the folder: fetch the missing "
                "file."
            )
        files.append(folder / name)
    return files


def _read_headers(file: Path) -> Mapping[str, TensorHeader]:
    headers = {}
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
                part = handle.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise ConversionError(
                        f"{file} holds {name} as {part.get_dtype()}: give a model with weights in "
                        f"{', '.join(_DTYPES)}, not a quantised one."
                    )
                dtype = _DTYPES[part.get_dtype()]
                headers[name] = TensorHeader(file, dtype, tuple(part.get_shape()))
    except SafetensorError as error:
        raise ConversionError(f"{file} is damaged ({error}): fetch it again.") from None
    return headers
