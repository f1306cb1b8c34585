"""An exported model without its folder: the same code and numbers, of weights in memory."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.hf.export import CODE_FILES
from megatron_mdm.hf.formats.exported_config import list_exported_sizes
from megatron_mdm.hf.formats.translation import to_format

# The files of an export import each other as neighbours in one folder, which here are in two.
_PACKAGE = "megatron_mdm_exported_code"


def build_exported_model(
    saved: SavedModel,
    weights: Iterable[tuple[str, Tensor]],
    *,
    eos_token_id: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """Builds the model that an export of these weights would load.

    Args:
        saved: The model.
        weights: Global name and whole tensor of each parameter, in any order.
        eos_token_id: Id that ends a document, if any.
        dtype: Of its weights.
        device: Where it computes.

    Returns:
        The model of transformers, for evaluation.

    Raises:
        ConversionError: A tensor is none of the model's.
    """
    tensors: dict[str, Tensor] = {}
    for name, whole in weights:
        for hf_name, tensor in to_format("hf", name, whole, saved):
            # A copy: what is a view would keep the whole.
            tensors[hf_name] = tensor.to(device, dtype, copy=True).contiguous()
    model = build_model_without_weights(saved, eos_token_id)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


def build_model_without_weights(saved: SavedModel, eos_token_id: int | None) -> Any:
    """Builds that model on the device `meta`: it takes no memory and computes nothing.

    Args:
        saved: The model.
        eos_token_id: Id that ends a document, if any.
    """
    code = _import_code()
    config = code.MdmConfig(**list_exported_sizes(saved), eos_token_id=eos_token_id)
    with torch.device("meta"):
        model: Any = code.MdmForMaskedLM(config)
    return model.eval()


def _import_code() -> Any:
    """Imports the files of an export as the package that they are in its folder."""
    if _PACKAGE not in sys.modules:
        package = ModuleType(_PACKAGE)
        package.__path__ = sorted({str(file.parent) for file in CODE_FILES})
        sys.modules[_PACKAGE] = package
    return importlib.import_module(f"{_PACKAGE}.modeling_mdm")
