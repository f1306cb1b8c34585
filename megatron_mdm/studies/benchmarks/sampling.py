"""Generation with an exported model, beside a sampler written as the papers' public code does it.

Shapes: B batch, S sequence, V vocabulary, M masked positions of the whole batch.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.config import ModelConfig
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.distributed.host_memory import keep_freed_memory
from megatron_mdm.hf.export import export_to_hf
from megatron_mdm.model.initialization import draw_initial_weight
from megatron_mdm.model.parameters import list_parameter_names
from megatron_mdm.studies.benchmarks.harness import interleave, summarize, summarize_ratios
from megatron_mdm.studies.benchmarks.settings import DEMO_SIZES, SamplingSettings, check_at_least


class _Run(NamedTuple):
    seconds: float
    passes: int
    tokens_BS: Tensor
    revealed: list[int]


def measure_sampling(settings: SamplingSettings) -> dict[str, Any]:
    """Times the samplers in turn on one model.

    Args:
        settings: What is generated.

    Returns:
        Of each case tokens per second, forward passes, passes that revealed nothing, and the most
        tokens that one pass revealed in a sequence on average; and how many times faster each is
        than the public way, or than the same case without guidance.

    Raises:
        ConfigError: A setting is out of range, or the model cannot be used.
    """
    check_at_least(settings)
    keep_freed_memory()  # of the baseline too, which would lose a tenth without it
    model = _load(settings)
    cases = _cases(model, settings)
    for case in cases.values():
        case()  # the first run of a case pays for memory and kernels
    runs = interleave(cases, settings.repeats)
    seconds = {name: [run.seconds for run in found] for name, found in runs.items()}
    num_new = settings.num_tokens * settings.batch_size
    results: dict[str, Any] = {name: _describe(found, num_new) for name, found in runs.items()}
    results["ratios"] = {
        f"{name}_over_{base}": summarize_ratios(seconds[base], seconds[name])
        for name, base in _COMPARED
    }
    results["parameters"] = sum(weight.numel() for weight in model.parameters())
    return results


_COMPARED = (
    ("whole", "public"),
    ("blocks", "public"),
    ("blocks_cached", "public"),
    ("guided", "whole"),
)


def public_sampler(
    model: torch.nn.Module,
    x_BS: Tensor,
    *,
    mask_token_id: int,
    num_steps: int,
    temperature: float,
    callback: Callable[[Tensor], None],
) -> Tensor:
    """Low-confidence remasking as the public code of the first paper does it.

    The whole sequence in every pass; softmax in float64 over every masked position; the number of
    tokens to reveal is truncated to an integer, over all sequences together, as is the choice of
    the surest, so that sequences compete; what truncation left over comes in the last step.

    Args:
        model: Maps tokens to an output with `logits`.
        x_BS: Tokens with masks, int64.
        mask_token_id: Id of the mask token.
        num_steps: Passes; all are made, also those that reveal nothing.
        temperature: 0 takes the best token.
        callback: Called after every step with the tokens.

    Returns:
        Filled tokens [B, S].

    Source:
        The procedure of arXiv 2410.18514, section 3.3 and its published evaluation code.
    """
    x_BS = x_BS.clone()
    times = torch.linspace(1.0, 1e-5, num_steps + 1).tolist()
    for step in range(num_steps):
        is_mask_BS = x_BS == mask_token_id
        logits_MV = model(x_BS).logits[is_mask_BS]
        noisy_MV = logits_MV
        if temperature > 0:
            uniform_MV = torch.rand_like(logits_MV, dtype=torch.float64)
            noisy_MV = logits_MV.double().exp() / (-uniform_MV.log()) ** temperature
        tokens_M = noisy_MV.argmax(-1)
        probs_MV = logits_MV.double().softmax(-1)
        confidence_M = probs_MV.gather(-1, tokens_M[:, None]).squeeze(-1)
        left = len(tokens_M)
        count = int(left * (1 - times[step + 1] / times[step])) if step < num_steps - 1 else left
        if count > 0:
            surest_K = confidence_M.topk(count).indices
            revealed_M = torch.full_like(tokens_M, mask_token_id)
            revealed_M[surest_K] = tokens_M[surest_K]
            x_BS[is_mask_BS] = revealed_M
        callback(x_BS)
    return x_BS


def _cases(model: Any, settings: SamplingSettings) -> dict[str, Callable[[], _Run]]:
    options = {
        "max_new_tokens": settings.num_tokens,
        "num_steps": settings.num_steps,
        "temperature": settings.temperature,
        "stop_at_end": False,
    }
    blocks = options | {"block_length": settings.block_length}
    empty_BP = torch.empty(settings.batch_size, 0, dtype=torch.long)
    masks_BS = torch.full((settings.batch_size, settings.num_tokens), model.config.mask_token_id)

    def public(note: Callable[[Tensor], None]) -> Tensor:
        return public_sampler(
            model,
            masks_BS,
            mask_token_id=model.config.mask_token_id,
            num_steps=settings.num_steps,
            temperature=settings.temperature,
            callback=note,
        )

    def ours(chosen: dict[str, Any]) -> Callable[[], _Run]:
        return lambda: _timed(
            model,
            lambda note: model.generate(
                empty_BP, callback=lambda reveal: note(reveal.x_BS), **chosen
            ),
        )

    return {
        "public": lambda: _timed(model, public),
        "whole": ours(options),
        "blocks": ours(blocks),
        "blocks_cached": ours(blocks | {"use_cache": True}),
        "guided": ours(options | {"guidance_scale": 1.0}),
    }


def _timed(model: Any, generate: Callable[[Callable[[Tensor], None]], Tensor]) -> _Run:
    left: list[int] = []
    mask_token_id = model.config.mask_token_id
    with _counted(model) as passes, torch.no_grad():
        start = time.perf_counter()
        tokens_BS = generate(lambda x_BS: left.append(int((x_BS == mask_token_id).sum())))
        seconds = time.perf_counter() - start
    if bool((tokens_BS == mask_token_id).any()):
        raise AssertionError("a sampler left masks")
    before = [tokens_BS.numel(), *left[:-1]]
    return _Run(seconds, passes[0], tokens_BS, [a - b for a, b in zip(before, left, strict=True)])


@contextmanager
def _counted(model: Any) -> Any:
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    handle = model.model.register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


def _describe(runs: list[_Run], num_new: int) -> dict[str, Any]:
    last = runs[-1]
    batch_size = last.tokens_BS.shape[0]
    return {
        "tokens_per_second": summarize([num_new / run.seconds for run in runs]),
        "seconds": summarize([run.seconds for run in runs]),
        "forward_passes": last.passes,
        "passes_that_revealed_nothing": last.revealed.count(0),
        "tokens_a_pass_and_sequence": {
            "least": min(last.revealed) / batch_size,
            "mean": statistics.mean(last.revealed) / batch_size,
            "most": max(last.revealed) / batch_size,
        },
    }


def _load(settings: SamplingSettings) -> Any:
    folder = settings.model
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
            return load_export(random_export(Path(scratch) / "model", settings.num_tokens))
    model = load_export(folder)
    if model.config.is_causal:
        raise ConfigError(f"--model={folder} is autoregressive: give a masked-diffusion model.")
    if model.config.max_position_embeddings < settings.num_tokens:
        raise ConfigError(
            f"--num-tokens={settings.num_tokens} is more than the "
            f"{model.config.max_position_embeddings} positions of --model={folder}: generate fewer."
        )
    return model


def load_export(folder: Path) -> Any:
    """Loads an exported model.

    Args:
        folder: Of the export.

    Returns:
        The model, ready to be asked.

    Raises:
        ConfigError: There is none.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model={folder} has no config.json: give an exported model.")
    return AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()


def random_export(folder: Path, seq_length: int, *, is_causal: bool = False) -> Path:
    """Exports a model of the demo's sizes with random weights: its speed is that of any other.

    Args:
        folder: Where; not there yet.
        seq_length: Most tokens of a sequence.
        is_causal: An autoregressive one.

    Returns:
        The folder.
    """
    model = ModelConfig.model_validate(DEMO_SIZES | {"vocab_size": 4096})
    saved = SavedModel(model, "ar" if is_causal else "mdm", seq_length)
    export_to_hf(
        _RandomWeights(model),
        saved,
        folder,
        tokenizer_dir=None,
        eos_token_id=None,
        metadata={},
    )
    return folder


class _RandomWeights:
    """Initial weights of a model, as a training checkpoint would hold them."""

    def __init__(self, model: ModelConfig) -> None:
        self._model = model

    def list_names(self) -> list[str]:
        return list_parameter_names(self._model)

    def load(self, name: str) -> Tensor:
        return torch.from_numpy(draw_initial_weight(name, self._model, seed=0))
