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
from transformers import AutoConfig, AutoModelForMaskedLM, logging

from megatron_mdm.config import Config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.data.loader import Batch
from megatron_mdm.hf.adapters.rows import RowBatch, gather, separate
from megatron_mdm.hf.adapters.settings import AdapterSettings


def read_sizes(folder: Path) -> Any:
    """Reads the configuration of an export.

    Args:
        folder: Its folder.

    Returns:
        Its `MdmConfig`.

    Raises:
        ConfigError: The folder is no export.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"--model={folder} is no exported model, which has config.json and .safetensors: make "
            "one with tools/convert_checkpoint.py to-hf."
        )
    try:
        sizes = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"--model={folder} cannot be loaded ({reason}): export the checkpoint again."
        ) from None
    if sizes.model_type != "megatron_mdm":
        raise ConfigError(
            f"--model={folder} holds a model of the kind {sizes.model_type}: convert it with "
            "tools/convert_checkpoint.py, then write it with its command to-hf."
        )
    return sizes


def check_fit(config: Config, sizes: Any, folder: Path) -> None:
    """Checks that a run is of the exported model.

    Args:
        config: The run.
        sizes: The export's configuration.
        folder: The export, for the message.

    Raises:
        ConfigError: It is of another model, or its windows are too long.
    """
    model = config.model
    stated = {
        "num_layers": (model.num_layers, sizes.num_hidden_layers),
        "hidden_size": (model.hidden_size, sizes.hidden_size),
        "num_attention_heads": (model.num_attention_heads, sizes.num_attention_heads),
        "vocab_size": (model.vocab_size, sizes.vocab_size),
        # Exports from before this field have no row that no token uses.
        "padded_vocab_size": (
            model.vocabulary_rows,
            getattr(sizes, "padded_vocab_size", sizes.vocab_size),
        ),
    }
    if not sizes.is_causal:
        stated["mask_token_id"] = (model.mask_id, sizes.mask_token_id)
    for name, (given, found) in stated.items():
        if given != found:
            raise ConfigError(
                f"model.{name}={given}, but {folder} has {found}: describe the exported model in "
                "the section model, or give another --model."
            )
    if config.data.seq_length > sizes.max_position_embeddings:
        raise ConfigError(
            f"data.seq_length={config.data.seq_length} is longer than the "
            f"{sizes.max_position_embeddings} tokens that {folder} was trained on: shorten it."
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
        self.peft: PeftModel = get_peft_model(base, settings.for_peft()).to(device)
        self.base: Any = self.peft.get_base_model()
        self.device = device

    def adapters(self) -> list[nn.Parameter]:
        """What is learned, in a fixed order."""
        return [one for one in self.peft.parameters() if one.requires_grad]

    def losses(self, batch: Batch, max_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Losses of a micro batch, pass by pass, so that the memory of each can be given back.

        Args:
            batch: Of the trainer.
            max_tokens: Most tokens of a pass, padding included.

        Yields:
            Sample numbers int64 [R], and float32 [R], what each row adds to its sample's loss in
            nats per token.
        """
        for rows in gather(separate(batch), max_tokens, self.base.config.mask_token_id):
            yield rows.samples_R.to(self.device), self._row_losses(rows)

    def _row_losses(self, rows: RowBatch) -> Tensor:
        mask_RL = rows.attention_mask_RL
        hidden_RLH = self.base.model(
            rows.inputs_RL.to(self.device),
            None if mask_RL is None else mask_RL.to(self.device),
            None,
        )
        # The output layer is most of a small model: only where something is learned.
        row_T, column_T = (rows.weights_RL != 0).nonzero(as_tuple=True)
        logits_TV = self.base.output_logits(hidden_RLH[row_T, column_T]).float()
        targets_T = rows.targets_RL[row_T, column_T].to(self.device)
        losses_T = F.cross_entropy(logits_TV, targets_T, reduction="none")
        weights_T = rows.weights_RL[row_T, column_T].to(self.device)
        sums_R = torch.zeros(len(rows.samples_R), device=self.device)
        return sums_R.index_add(0, row_T.to(self.device), losses_T * weights_T)
