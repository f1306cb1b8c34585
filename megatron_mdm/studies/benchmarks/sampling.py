"""Generation with an exported model, beside a sampler written as the papers' public code does it.

Shapes: B batch, S sequence, V vocabulary, M masked positions of the whole batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.distributed.host_memory import keep_freed_memory
from megatron_mdm.studies.benchmarks.devices import choose_device, now
from megatron_mdm.studies.benchmarks.exported_models import load_export, make_random_model
from megatron_mdm.studies.benchmarks.harness import interleave, summarize, summarize_ratios
from megatron_mdm.studies.benchmarks.public_code import public_sampler
from megatron_mdm.studies.benchmarks.settings import SamplingSettings


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
        ConfigError: A setting is out of range, or the model or the device cannot be used.
    """
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


def _cases(model: Any, settings: SamplingSettings) -> dict[str, Callable[[], _Run]]:
    options = {
        "max_new_tokens": settings.num_tokens,
        "num_steps": settings.num_steps,
        "temperature": settings.temperature,
        "stop_at_end": False,
    }
    blocks = options | {"block_length": settings.block_length}
    shape = (settings.batch_size, settings.num_tokens)
    masks_BS = torch.full(shape, model.config.mask_token_id, device=model.device)
    empty_BP = masks_BS[:, :0]

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
    counts: list[Tensor] = []
    mask_token_id = model.config.mask_token_id
    with _counted(model) as passes, torch.no_grad():
        start = now(model.device)
        # Read afterwards, so that the host of a GPU does not wait for them.
        tokens_BS = generate(lambda x_BS: counts.append((x_BS == mask_token_id).sum()))
        seconds = now(model.device) - start
    if bool((tokens_BS == mask_token_id).any()):
        raise AssertionError("a sampler left masks")
    left = [int(one) for one in counts]
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
    folder, device = settings.model, choose_device(settings.device)
    if folder is None:
        return make_random_model(settings.preset, settings.num_tokens, device)
    model = load_export(folder, device)
    if model.config.is_causal:
        raise ConfigError(f"--model={folder} is autoregressive: give a masked-diffusion model.")
    if model.config.max_position_embeddings < settings.num_tokens:
        raise ConfigError(
            f"--num-tokens={settings.num_tokens} is more than the "
            f"{model.config.max_position_embeddings} positions of --model={folder}: generate fewer."
        )
    return model
