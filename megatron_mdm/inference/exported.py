"""An exported model with its tokenizer, on a GPU if there is one, for generation and scoring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForMaskedLM, logging

from megatron_mdm.config.objective import RunWay, check_way
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import read_json
from megatron_mdm.core.remarks import warn
from megatron_mdm.corpus.tokenizer import hash_tokenizer, read_tokenizer
from megatron_mdm.corpus.tokenizer_record import TokenizerRecord
from megatron_mdm.diffusion.decoding import Decoding
from megatron_mdm.diffusion.interpolation import read_noise
from megatron_mdm.diffusion.samplers import StepCallback
from megatron_mdm.distributed.host_memory import keep_freed_memory
from megatron_mdm.inference.models import ModelFacts, SamplingBatch
from megatron_mdm.inference.passes import (
    Judgement,
    Passes,
    compute_logits,
    judge_with,
    takes_log_snr,
)
from megatron_mdm.inference.texts import wrap_tokenizer
from megatron_mdm.reporting.run_folder import UNIGRAM_NATS


class ExportedModel:
    """A `TextModel` and `ScoringModel` that runs the code of its export.

    Args:
        folder: Folder of an exported model.
        dtype: Of the weights and of the passes; None: as exported.
        way: How it runs; None: as it says itself.

    Raises:
        ConfigError: The folder holds no model that can be loaded, or that can run so.
    """

    facts: ModelFacts

    def __init__(
        self, folder: Path, dtype: torch.dtype | None = None, way: RunWay | None = None
    ) -> None:
        logging.disable_progress_bar()
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"--model={folder} has no config.json: give the folder of an exported model, which "
                "mdm convert to-hf makes of a run."
            )
        if not (folder / "tokenizer.json").is_file():
            raise ConfigError(
                f"--model={folder} has no tokenizer.json, so it takes no text: export it with the "
                "tokenizer that it was trained with."
            )
        running = _choose_way(folder, way)
        try:
            model = AutoModelForMaskedLM.from_pretrained(
                folder, trust_remote_code=True, dtype=dtype or "auto", **running
            )
        except (OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ConfigError(
                f"--model={folder} cannot be loaded ({reason}): export the checkpoint again."
            ) from error
        # The one that made the training data, without the mask token that the export adds to it.
        backend, eos_token = read_tokenizer(folder / "tokenizer.json")
        stated = _read_metadata(folder)
        _compare_tokenizer(folder, backend, stated)
        if not hasattr(model, "generation_defaults") or not hasattr(model.model, "takes_key_masks"):
            raise ConfigError(
                f"--model={folder} was exported by an earlier version, whose code travels in the "
                "folder: export the checkpoint again."
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            keep_freed_memory()
        name = "/".join(folder.resolve().parts[-2:])
        self._begin(model.eval().to(device), wrap_tokenizer(backend, eos_token), name)
        self.facts = replace(self.facts, corpus_nats=stated.get(UNIGRAM_NATS))

    @classmethod
    def hold(cls, model: Any, tokenizer: Any, name: str) -> Self:
        """Makes one of what is in memory.

        Args:
            model: As transformers loads an export, in evaluation mode, where it shall compute.
            tokenizer: As `wrap_tokenizer` makes it.
            name: What to call it.
        """
        held = cls.__new__(cls)
        held._begin(model, tokenizer, name)
        return held

    def _begin(self, model: Any, tokenizer: Any, name: str) -> None:
        self._model, self.tokenizer = model, tokenizer
        self.facts = _read_facts(name, model, tokenizer)

    @property
    def device(self) -> torch.device:
        """See `ScoringModel.device`."""
        device: torch.device = self._model.device
        return device

    def complete(self, batch: SamplingBatch, callback: StepCallback | None = None) -> Tensor:
        """See `TextModel.complete`."""
        device, guidance_BS = self.device, batch.guidance_BS
        # Without padding the model can use the faster kernels.
        has_padding = not bool(batch.is_real_BS.all())
        run = self._model.generate if self.facts.is_causal else self._model.infill
        try:
            sampled_BS: Tensor = run(
                batch.tokens_BS.to(device),
                batch.is_real_BS.long().to(device) if has_padding else None,
                # By name: the code of the export has a class of its own.
                generation_config=_list_options(batch.decoding),
                guidance_ids=None if guidance_BS is None else guidance_BS.to(device),
                seeds=batch.seeds,
                callback=callback,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return sampled_BS.cpu()

    def run_on_driver(self, work: Callable[[], None]) -> None:
        """Does work: no other rank takes part."""
        work()

    def judge(self, passes: Passes) -> Judgement:
        """See `ScoringModel.judge`."""
        return judge_with(self._model, passes)

    def compute_logits(self, passes: Passes) -> Tensor:
        """Logits of the asked positions, float32 [T, V]."""
        return compute_logits(self._model, passes)


def _choose_way(folder: Path, way: RunWay | None) -> dict[str, bool]:
    """Fields of the model's configuration by which it runs in a way, if it has several."""
    config = read_json(folder / "config.json", "export the checkpoint again.")
    stated = config.get("run_ways")
    ways = stated or ["ar" if config.get("is_causal") else "mdm"]
    chosen = check_way(way, ways, f"--model={folder}")
    if stated is None:
        return {}
    return {"is_causal": chosen != "mdm", "prefix_lm": chosen == "prefix"}


def _list_options(decoding: Decoding) -> dict[str, Any]:
    # Exports of earlier versions know no open order.
    return {
        name: value
        for name, value in asdict(decoding).items()
        if value is not None or name not in ("order", "temperature", "correction_steps")
    }


def _read_metadata(folder: Path) -> dict[str, Any]:
    path = folder / "training_metadata.json"
    stated = read_json(path, "export the checkpoint again.") if path.is_file() else {}
    return stated if isinstance(stated, dict) else {}


def _compare_tokenizer(folder: Path, backend: Tokenizer, stated: dict[str, Any]) -> None:
    """Warns of a tokenizer other than that of the training data."""
    if "tokenizer" in stated:
        record = TokenizerRecord.model_validate(stated["tokenizer"])
        remark = record.describe_difference(hash_tokenizer(backend), str(folder / "tokenizer.json"))
        if remark is not None:
            warn(remark)


def _read_facts(name: str, model: Any, tokenizer: Any) -> ModelFacts:
    config, defaults = model.config, Decoding(**asdict(model.generation_defaults))
    end_tokens = (defaults.end_token_id, config.eos_token_id, tokenizer.eos_token_id)
    return ModelFacts(
        name=name,
        is_causal=config.is_causal,
        vocab_size=config.vocab_size,
        mask_token_id=config.mask_token_id,
        max_length=config.max_position_embeddings,
        end_token_id=next((token for token in end_tokens if token is not None), None),
        decoding=defaults,
        noise=None if getattr(config, "noise", None) is None else read_noise(config.noise),
        takes_log_snr=takes_log_snr(model),
        # Exports of earlier versions run in one way.
        is_shifted=getattr(config, "is_shifted", False) and not config.is_causal,
        sees_prompt=getattr(config, "prefix_lm", False) and config.is_causal,
    )
