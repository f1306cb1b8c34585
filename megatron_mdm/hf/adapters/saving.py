"""Adapters on disk: a folder of peft, or merged into an export that needs no peft."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.hf.placing import open_whole_folder
from megatron_mdm.hf.tokenizer_files import replace_chat_template

METADATA = "training_metadata.json"
_CARD = "README.md"
_ADAPTER = "default"
_MERGED = """
## Fine-tuning

Low-rank adapters that learned responses to prompts have been added to the weights since: the losses
above are those of the model before. `training_metadata.json` says how, under `lora`.
"""


def check_new(path: Path, option: str) -> None:
    """Checks that a folder can be made.

    Args:
        path: The folder.
        option: Which option names it.

    Raises:
        ConfigError: It is there already.
    """
    if path.exists():
        raise ConfigError(f"{option}={path} exists already: name a new folder, or remove it.")


def save_adapter(model: PeftModel, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Writes adapters, whole or not at all.

    Args:
        model: The adapted model.
        folder: A new folder, for `peft.PeftModel.from_pretrained`.
        metadata: JSON values: how they came about.

    Raises:
        ConversionError: It cannot be written.
    """
    with open_whole_folder(folder.absolute(), overwrite=False) as placing:
        # Without the embeddings, which are unchanged; peft would ask the hub whether they are.
        model.save_pretrained(str(placing.partial), save_embedding_layers=False)
        (placing.partial / _CARD).write_text(_format_adapter_card(metadata), encoding="utf-8")
        _write_metadata(placing.partial, metadata)


def merge_adapter(
    model: PeftModel,
    base: Path,
    folder: Path,
    metadata: Mapping[str, Any],
    chat_template: str | None = None,
) -> None:
    """Writes the export again with the adapters added to its weights, whole or not at all.

    Sums are made in float32 and rounded once to the export's own dtype.

    Args:
        model: The adapted model.
        base: The export.
        folder: A new folder: an export like the base.
        metadata: JSON values: how the adapters came about.
        chat_template: Jinja template that told conversations; None: the base's, if any.

    Raises:
        ConversionError: It cannot be written.
    """
    deltas = _compute_deltas(model)
    with open_whole_folder(folder.absolute(), overwrite=False) as placing:
        for path in sorted(base.iterdir()):
            if path.suffix == ".safetensors":
                _merge_file(path, placing.partial / path.name, deltas)
            elif path.is_file() and path.name != METADATA:
                shutil.copyfile(path, placing.partial / path.name)
        if deltas:
            raise ConfigError(
                f"{base} has no weight {min(deltas)}, which an adapter belongs to: merge into the "
                "export that was adapted."
            )
        if chat_template is not None and (base / "tokenizer.json").is_file():
            replace_chat_template(placing.partial, chat_template)
        before = base / METADATA
        found = json.loads(before.read_text(encoding="utf-8")) if before.is_file() else {}
        _write_metadata(placing.partial, {**found, "lora": dict(metadata)})
        with (placing.partial / _CARD).open("a", encoding="utf-8") as card:
            card.write(_MERGED)


@torch.no_grad()
def _compute_deltas(model: PeftModel) -> dict[str, Tensor]:
    """Computes what each adapter adds to its matrix, by the export's names."""
    layers: dict[str, Any] = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }
    return {
        f"{name}.weight": layer.get_delta_weight(_ADAPTER).float().cpu()
        for name, layer in layers.items()
    }


def _merge_file(source: Path, target: Path, deltas: dict[str, Tensor]) -> None:
    """Copies a file of weights; deltas that find their weight are taken out of `deltas`."""
    with safe_open(source, framework="pt") as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        facts = stream.metadata()
    for name in tensors.keys() & deltas.keys():
        weight = tensors[name]
        tensors[name] = (weight.float() + deltas.pop(name)).to(weight.dtype)
    save_file(tensors, target, metadata=facts)


def _format_adapter_card(metadata: Mapping[str, Any]) -> str:
    base = str(metadata["base_model"])
    head = yaml.safe_dump({"library_name": "peft", "base_model": base, "tags": ["lora"]})
    return (
        f"---\n{head}---\n\nLow-rank adapters for the exported model `{base}`, which learned "
        f"responses to prompts. `{METADATA}` says how. To load them:\n\n```python\n"
        "from peft import PeftModel\nfrom transformers import AutoModelForMaskedLM\n\n"
        f"base = AutoModelForMaskedLM.from_pretrained({base!r}, trust_remote_code=True)\n"
        "model = PeftModel.from_pretrained(base, FOLDER)\n```\n"
    )


def _write_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    text = json.dumps(dict(metadata), indent=2, ensure_ascii=False)
    (folder / METADATA).write_text(text + "\n", encoding="utf-8")
