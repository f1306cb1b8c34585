"""Do both sides of a conversion compute the same logits?

The source runs in its own code wherever that can be: transformers' classes for `llama`, `qwen2` and
`qwen3`, the code in the folder for `llada` if it may run, the Megatron model for our checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from megatron_mdm.checkpoint.manifest import RAW, SavedModel
from megatron_mdm.core.errors import ConversionError
from megatron_mdm.hf.conversion.checkpoint_logits import read_model, run_checkpoint
from megatron_mdm.hf.conversion.source_logits import gidd_logits, llada_logits, smdm_logits
from megatron_mdm.hf.formats.foreign import ForeignModel, open_foreign
from megatron_mdm.hf.formats.foreign_configs import AUTOREGRESSIVE
from megatron_mdm.hf.formats.tensor_files import read_json

# Largest difference of a logit, over the standard deviation of all logits, that the order of
# float32 additions explains. Both sides round their weights alike, so it holds for every dtype.
TOLERANCE = 1e-4

_NUM_SEQUENCES, _SEQ_LENGTH = 2, 48


@dataclass(frozen=True)
class LogitCheck:
    """Logits of two models on the same random tokens, compared.

    Attributes:
        left: What was converted.
        right: What came out.
        num_tokens: Positions compared.
        max_difference: Largest absolute difference of a logit.
        spread: Standard deviation of the left side's logits.
        tolerance: Largest `relative` difference that rounding explains.
        notes: What to know besides, in sentences.
    """

    left: str
    right: str
    num_tokens: int
    max_difference: float
    spread: float
    tolerance: float
    notes: tuple[str, ...] = ()

    @property
    def relative(self) -> float:
        """The difference as a share of the spread."""
        return self.max_difference / self.spread if self.spread > 0 else self.max_difference

    @property
    def passed(self) -> bool:
        """Does rounding explain the difference? A logit that is not a number never passes."""
        return self.relative <= self.tolerance

    def describe(self) -> str:
        """One line for a user."""
        verdict = "agree" if self.passed else "DIFFER"
        line = (
            f"logits {verdict}: {self.right} against {self.left}, {self.num_tokens} tokens, "
            f"largest difference {self.max_difference:.2e}, which is {self.relative:.2e} of their "
            f"standard deviation (rounding explains {self.tolerance:.0e})."
        )
        return " ".join([line, *self.notes])


class _Logits(NamedTuple):
    values_BSV: Tensor
    side: str
    notes: tuple[str, ...] = ()


def check_import(
    source: ForeignModel, result: Path, *, seed: int = 0, trust_remote_code: bool = False
) -> LogitCheck:
    """Compares a model of another format with what it was converted to.

    Args:
        source: What was converted.
        result: An export of ours, or a checkpoint: its own folder, a run's or its `checkpoints`.
        seed: Draws the tokens.
        trust_remote_code: Run the code that lies in a LLaDA folder; else our own reading of it.

    Returns:
        The comparison, whether the logits agree or not.

    Raises:
        ConversionError: The result is neither, or the two have different sizes.
        CheckpointError: The checkpoint is not whole.
    """
    # An autoregressive model is compared with causal attention: with full attention it is
    # undefined.
    is_causal = source.format_name in AUTOREGRESSIVE or source.saved.is_causal
    tokens_BS = _draw_tokens(source.saved, seed, with_masks=not is_causal)
    if (result / "config.json").is_file():
        exported = open_foreign("hf", result)
        saved, dtype = exported.saved, exported.dtype
    else:
        saved, dtype = read_model(result), torch.float32
    _check_same_sizes(source.saved, saved, result)
    left = _compute_source_logits(source, tokens_BS, dtype, trust_remote_code)
    right = _run_result(result, saved, tokens_BS, dtype, is_causal)
    return _compare(left, right, source.saved)


def check_export(
    checkpoint: Path, export: Path, *, weights: str = RAW, seed: int = 0
) -> LogitCheck:
    """Compares a checkpoint's model, as training runs it, with its export.

    Args:
        checkpoint: A checkpoint: its own folder, a run's or its `checkpoints`.
        export: The export's folder.
        weights: `raw`, or the name of the average that was exported.
        seed: Draws the tokens.

    Returns:
        The comparison, whether the logits agree or not.

    Raises:
        ConversionError: The folder is no export, or the two have different sizes.
        CheckpointError: The checkpoint is not whole.
    """
    saved = read_model(checkpoint)
    exported = open_foreign("hf", export)
    _check_same_sizes(saved, exported.saved, export)
    tokens_BS = _draw_tokens(saved, seed, with_masks=not saved.is_causal)
    left = _run_result(checkpoint, saved, tokens_BS, exported.dtype, saved.is_causal, weights)
    right = _run_result(export, exported.saved, tokens_BS, exported.dtype, saved.is_causal)
    return _compare(left, right, saved)


def _draw_tokens(saved: SavedModel, seed: int, *, with_masks: bool) -> Tensor:
    """Tokens [B, S] of the vocabulary; in each sequence a different share is masked."""
    generator = torch.Generator().manual_seed(seed)
    seq_length = min(_SEQ_LENGTH, saved.seq_length)
    size = (_NUM_SEQUENCES, seq_length)
    tokens_BS = torch.randint(saved.model.vocab_size, size, generator=generator)
    if with_masks:
        shares_B1 = torch.linspace(0.25, 0.75, _NUM_SEQUENCES)[:, None]
        is_mask_BS = torch.rand(size, generator=generator) < shares_B1
        tokens_BS = tokens_BS.masked_fill(is_mask_BS, saved.model.mask_id)
    return tokens_BS


@torch.no_grad()
def _compute_source_logits(
    source: ForeignModel, tokens_BS: Tensor, dtype: torch.dtype, trust_remote_code: bool
) -> _Logits:
    side = f"{source.format_name} model {source.path}"

    def load(name: str) -> Tensor:
        return source.load_external(name).to(dtype).float()

    if source.format_name == "hf":
        saved = source.saved
        return _run_result(source.folder, saved, tokens_BS, dtype, saved.is_causal)
    if source.format_name in AUTOREGRESSIVE:
        if source.path != source.folder:
            raise ConversionError(
                f"{source.path} is a file, and transformers loads folders: give the folder to "
                "compare with."
            )
        model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
        return _Logits(_round_weights(model, dtype)(tokens_BS).logits, side)
    if source.format_name == "smdm":
        return _Logits(smdm_logits(load, source.saved, tokens_BS), side)
    note = "The source ran in our own reading of its architecture, not in its own code."
    if source.format_name == "gidd":
        fields = read_json(source.folder / "config.json")
        return _Logits(gidd_logits(load, fields, tokens_BS), side, (note,))
    if trust_remote_code and "auto_map" in read_json(source.folder / "config.json"):
        model = AutoModel.from_pretrained(
            source.folder, dtype=torch.float32, trust_remote_code=True
        )
        return _Logits(_round_weights(model, dtype)(tokens_BS).logits, side)
    return _Logits(llada_logits(load, source.saved, tokens_BS), side, (note,))


@torch.no_grad()
def _run_result(
    result: Path,
    saved: SavedModel,
    tokens_BS: Tensor,
    dtype: torch.dtype,
    is_causal: bool,
    weights: str = RAW,
) -> _Logits:
    log_snr_B = None
    if saved.model.time_embedding:
        log_snr_B = torch.linspace(-3.0, 3.0, len(tokens_BS))
    if (result / "config.json").is_file():
        model: Any = AutoModelForMaskedLM.from_pretrained(
            result, dtype=torch.float32, trust_remote_code=True, is_causal=is_causal
        )
        # Logits where the hidden states are, whatever they predict.
        model.config.is_shifted = False
        told = {} if log_snr_B is None else {"log_snr": log_snr_B}
        return _Logits(_round_weights(model, dtype)(tokens_BS, **told).logits, f"export {result}")
    logits_BSV = run_checkpoint(
        result, tokens_BS, weights=weights, dtype=dtype, is_causal=is_causal, log_snr_B=log_snr_B
    )
    return _Logits(logits_BSV, f"checkpoint {result}")


def _round_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Rounds weights as the export did; the arithmetic stays in float32."""
    for parameter in model.eval().parameters():
        parameter.data = parameter.data.to(dtype).float()
    return model


def _check_same_sizes(left: SavedModel, right: SavedModel, path: Path) -> None:
    for field in ("num_layers", "hidden_size", "vocab_size", "vocabulary_rows", "mask_id"):
        ours, other = getattr(left.model, field), getattr(right.model, field)
        if ours != other:
            raise ConversionError(
                f"{path} has {field}={other} where the model it is compared with has {ours}: "
                "compare a model with its own conversion."
            )


def _compare(left: _Logits, right: _Logits, saved: SavedModel) -> LogitCheck:
    left_BSV = left.values_BSV[..., : saved.model.vocab_size].double()
    right_BSV = right.values_BSV[..., : saved.model.vocab_size].double()
    # Leave out the mask token inside the vocabulary: one side may forbid it and the other not.
    forbidden_V = (left_BSV == -torch.inf).flatten(0, 1).all(0)
    forbidden_V |= (right_BSV == -torch.inf).flatten(0, 1).all(0)
    kept_V = ~forbidden_V
    return LogitCheck(
        left.side,
        right.side,
        left_BSV.shape[0] * left_BSV.shape[1],
        (left_BSV - right_BSV)[..., kept_V].abs().max().item(),
        left_BSV[..., kept_V].std().item(),
        TOLERANCE,
        left.notes + right.notes,
    )
