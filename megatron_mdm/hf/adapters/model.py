"""An exported model with adapters, and its loss on the trainer's batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, logging

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.config import Config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.data.loader import Batch
from megatron_mdm.hf.adapters.rows import RowBatch, gather, separate
from megatron_mdm.hf.adapters.settings import AdapterSettings
from megatron_mdm.hf.formats.config_fields import ConfigFields
from megatron_mdm.hf.formats.exported_config import MODEL_TYPE, read_exported

# Fields of the section `model` that have to fit, and the properties that have their values.
_SIZES = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "padded_vocab_size": "vocabulary_rows",
    "mask_token_id": "mask_id",
}


def read_export(folder: Path) -> SavedModel:
    """Reads what an export is.

    Args:
        folder: Its folder.

    Returns:
        The model.

    Raises:
        ConfigError: The folder is no export.
        ConversionError: Its config.json is damaged.
    """
    path = folder / "config.json"
    if not path.is_file() or not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"--model={folder} is no exported model, which has config.json and .safetensors: make "
            "one with mdm convert to-hf."
        )
    fields = ConfigFields(path)
    if fields.get("model_type") != MODEL_TYPE:
        raise ConfigError(
            f"--model={folder} holds a model of the kind {fields.get('model_type')}: convert it "
            "with mdm convert, then write it with its command to-hf."
        )
    return read_exported(fields)


def check_fit(config: Config, exported: SavedModel, folder: Path) -> None:
    """Checks that a run is of the exported model.

    Args:
        config: The run.
        exported: The model.
        folder: The export, for the message.

    Raises:
        ConfigError: It is of another model, or its windows are too long.
    """
    for field, value in _SIZES.items():
        given, found = getattr(config.model, value), getattr(exported.model, value)
        # An autoregressive model never sees the mask.
        if given != found and not (field == "mask_token_id" and exported.is_causal):
            raise ConfigError(
                f"model.{field}={given}, but {folder} has {found}: describe the exported model in "
                "the section model, or give another --model."
            )
    if config.data.seq_length > exported.seq_length:
        raise ConfigError(
            f"data.seq_length={config.data.seq_length} is longer than the "
            f"{exported.seq_length} tokens that {folder} was trained on: shorten it."
        )


class AdaptedModel:
    """An export whose adapters are learned and whose own weights stay.

    Args:
        folder: The export.
        settings: Its adapters; their first values are drawn from `seed`, alike on every rank.
        seed: Any integer.
        device: Where it computes.
        dtype: Of its weights and passes; adapters are float32.

    Raises:
        ConfigError: The export cannot be loaded.
    """

    def __init__(
        self,
        folder: Path,
        settings: AdapterSettings,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        logging.disable_progress_bar()
        try:
            base = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
        except (OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ConfigError(
                f"--model={folder} cannot be loaded ({reason}): export the checkpoint again."
            ) from error
        torch.manual_seed(seed)
        self.peft: PeftModel = get_peft_model(base, settings.to_peft()).to(device)
        self.base: Any = self.peft.get_base_model()
        self.device = device

    def list_adapters(self) -> list[nn.Parameter]:
        """Lists the parameters that are learned, in a fixed order."""
        return [one for one in self.peft.parameters() if one.requires_grad]

    def compute_losses(self, batch: Batch, max_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Computes the losses of a micro batch, pass by pass, so that a pass can free its memory.

        Args:
            batch: Of the trainer.
            max_tokens: Most tokens of a pass, padding included.

        Yields:
            Sample numbers int64 [R], and float32 [R], what each row adds to its sample's loss in
            nats per token.
        """
        for rows in gather(separate(batch), max_tokens, self.base.config.mask_token_id):
            yield rows.samples_R.to(self.device), self._compute_row_losses(rows)

    def _compute_row_losses(self, rows: RowBatch) -> Tensor:
        mask_RL = rows.attention_mask_RL
        hidden_RLH = self.base.model(
            rows.inputs_RL.to(self.device),
            None if mask_RL is None else mask_RL.to(self.device),
            None,
        )
        # Only at learned positions: the output layer is most of a small model.
        row_T, column_T = (rows.weights_RL != 0).nonzero(as_tuple=True)
        logits_TV = self.base.output_logits(hidden_RLH[row_T, column_T]).float()
        targets_T = rows.targets_RL[row_T, column_T].to(self.device)
        losses_T = F.cross_entropy(logits_TV, targets_T, reduction="none")
        weights_T = rows.weights_RL[row_T, column_T].to(self.device)
        sums_R = torch.zeros(len(rows.samples_R), device=self.device)
        return sums_R.index_add(0, row_T.to(self.device), losses_T * weights_T)
