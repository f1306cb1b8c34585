"""From requests to batches of token ids: what fits, and which samples share their forward passes.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.diffusion.decoding import Decoding, sequence_seeds
from megatron_mdm.inference.generation.requests import Request
from megatron_mdm.inference.generation.settings import GenerationSettings
from megatron_mdm.inference.generation.text_model import Batch, ModelFacts


@dataclass(frozen=True)
class Hole:
    """One sample to make.

    Attributes:
        request: Number of its request, from 0.
        sample: Number among the samples of that request, from 0.
        prompt: Token ids before the new ones.
        num_new_tokens: How many of these.
        suffix: Token ids after them.
        has_suffix: Was a suffix given, if only an empty one?
        hidden_prompt: What the other pass of guidance sees in the prompt's place, of equal length;
            None without guidance.
        seed: Decides its random numbers.
        decoding: Options of the sampler.
    """

    request: int
    sample: int
    prompt: tuple[int, ...]
    num_new_tokens: int
    suffix: tuple[int, ...]
    has_suffix: bool
    hidden_prompt: tuple[int, ...] | None
    seed: int
    decoding: Decoding

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole sequence."""
        return len(self.prompt) + self.num_new_tokens + len(self.suffix)


def make_holes(
    requests: Sequence[Request],
    settings: GenerationSettings,
    facts: ModelFacts,
    tokenizer: Any,
    *,
    cut_prompts: bool = False,
) -> list[Hole]:
    """Encodes all requests and checks that the model can do them.

    Args:
        requests: The texts.
        settings: How.
        facts: What the model can do.
        tokenizer: The model's, of transformers.
        cut_prompts: Leave out the start of a prompt that is too long, instead of refusing it.

    Returns:
        `num_samples` holes for each request, in their order.

    Raises:
        ConfigError: A request or an option does not fit the model.
    """
    decoding = settings.resolved(facts.decoding)
    _check_options(settings, decoding, facts)
    guidance = None
    if settings.guidance_prompt is not None:
        guidance = _encode(tokenizer, settings.guidance_prompt, facts, "--guidance-prompt")
    holes = []
    seeds = sequence_seeds(settings.seed, len(requests))
    for number, request in enumerate(requests):
        name = f"prompt {number + 1}"
        prompt = _encode(tokenizer, request.prompt, facts, name)
        suffix = _encode(tokenizer, request.suffix or "", facts, f"the suffix of {name}")
        num_new_tokens = request.length or settings.length
        room = facts.max_length - num_new_tokens - len(suffix)
        if cut_prompts and len(prompt) > room > 0:
            prompt = prompt[-room:]
        hole = Hole(
            request=number,
            sample=0,
            prompt=prompt,
            num_new_tokens=num_new_tokens,
            suffix=suffix,
            has_suffix=request.suffix is not None,
            hidden_prompt=None,
            seed=0,
            decoding=_with_end(decoding, settings, facts, request.suffix is not None),
        )
        _check_request(hole, facts, name)
        if decoding.guidance_scale != 0.0:
            hidden = _hidden_prompt(guidance, len(prompt), facts.mask_token_id, name)
            hole = replace(hole, hidden_prompt=hidden)
        holes += [
            replace(hole, sample=sample, seed=seed)
            for sample, seed in enumerate(sequence_seeds(seeds[number], settings.num_samples))
        ]
    return holes


def plan_batches(
    holes: Sequence[Hole], settings: GenerationSettings, facts: ModelFacts
) -> Iterator[tuple[list[Hole], Batch]]:
    """Puts holes of similar size together.

    Args:
        holes: What to fill.
        settings: How many at once.
        facts: What a batch may hold.

    Yields:
        The holes of a batch, and the batch.
    """

    def group(hole: Hole) -> tuple[int, ...]:
        stops = int(hole.decoding.end_token_id is not None)
        if not facts.is_causal:
            return (stops,)
        return stops, hole.num_new_tokens, 0 if facts.aligns_prompts else len(hole.prompt)

    def size(hole: Hole) -> tuple[int, ...]:
        return *group(hole), hole.num_new_tokens, hole.num_tokens

    for _, members in groupby(sorted(holes, key=size), key=group):
        waiting = list(members)
        for start in range(0, len(waiting), settings.batch_size):
            chosen = waiting[start : start + settings.batch_size]
            yield chosen, _make_batch(chosen, settings, facts)


def _make_batch(holes: list[Hole], settings: GenerationSettings, facts: ModelFacts) -> Batch:
    mask_id = facts.mask_token_id
    if facts.is_causal:
        rows = [[*hole.prompt] for hole in holes]
    else:
        rows = [[*hole.prompt, *[mask_id] * hole.num_new_tokens, *hole.suffix] for hole in holes]
    width = max(map(len, rows))
    # Any token but the mask, which would be filled.
    padding = 0 if mask_id else 1
    tokens_BS = torch.full((len(rows), width), padding)
    is_real_BS = torch.zeros((len(rows), width), dtype=torch.bool)
    hidden_BS = None if holes[0].hidden_prompt is None else tokens_BS.clone()
    for index, (hole, row) in enumerate(zip(holes, rows, strict=True)):
        start = width - len(row) if facts.is_causal else 0
        columns = slice(start, start + len(row))
        tokens_BS[index, columns] = torch.tensor(row, dtype=torch.int64)
        is_real_BS[index, columns] = True
        if hidden_BS is not None and hole.hidden_prompt is not None:
            rest = row[len(hole.prompt) :]
            if settings.guidance_prompt is None:
                # Without a text to compare with, the other pass sees nothing that was given.
                rest = [mask_id] * len(rest)
            hidden_BS[index, columns] = torch.tensor([*hole.hidden_prompt, *rest])
    return Batch(
        tokens_BS=tokens_BS,
        is_real_BS=is_real_BS,
        hidden_BS=hidden_BS,
        num_new_tokens=max(hole.num_new_tokens for hole in holes),
        seeds=[hole.seed for hole in holes],
        decoding=holes[0].decoding,
        cache=settings.cache,
        cache_refresh_steps=settings.cache_refresh_steps,
    )


def _encode(tokenizer: Any, text: str, facts: ModelFacts, name: str) -> tuple[int, ...]:
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    beyond = next((token_id for token_id in ids if token_id >= facts.vocab_size), None)
    if beyond is not None:
        raise ConfigError(
            f"The tokenizer turns {name} into token {beyond}, but {facts.name} has a vocabulary "
            f"of {facts.vocab_size}: use the tokenizer that the model was trained with."
        )
    return ids


def _with_end(
    decoding: Decoding, settings: GenerationSettings, facts: ModelFacts, has_suffix: bool
) -> Decoding:
    """Says what the token that ends a text does."""
    stops = facts.stops_at_end and not has_suffix
    end = settings.end_of_text or ("stop" if stops else "keep")
    if facts.end_token_id is None or end == "keep":
        return replace(decoding, end_token_id=None)
    if end == "stop":
        return replace(decoding, end_token_id=facts.end_token_id)
    forbidden = (*decoding.forbidden_token_ids, facts.end_token_id)
    return replace(decoding, end_token_id=None, forbidden_token_ids=forbidden)


def _check_options(settings: GenerationSettings, decoding: Decoding, facts: ModelFacts) -> None:
    if settings.end_of_text in ("stop", "forbid") and facts.end_token_id is None:
        raise ConfigError(
            f"--end-of-text={settings.end_of_text} needs a token that ends texts, but "
            f"{facts.name} names none: leave it out."
        )
    given = (settings.cache, settings.cache_refresh_steps) != (None, None)
    if given and not facts.has_cache:
        raise ConfigError(
            "--cache works with exported models only: leave it out, or export the checkpoint with "
            "tools/convert_checkpoint.py and give --model."
        )
    if facts.is_causal:
        try:
            decoding.check_autoregressive()
        except ValueError as error:
            raise ConfigError(str(error)) from None


def _check_request(hole: Hole, facts: ModelFacts, name: str) -> None:
    if facts.is_causal and hole.has_suffix:
        raise ConfigError(
            f"{name.capitalize()} has a suffix, but {facts.name} is autoregressive and only "
            "continues texts: leave the suffix out."
        )
    if facts.is_causal and not hole.prompt:
        raise ConfigError(
            f"{name.capitalize()} is empty, but {facts.name} is autoregressive and needs a token "
            "to start from: give a text."
        )
    if hole.num_tokens > facts.max_length:
        raise ConfigError(
            f"{name.capitalize()} has {len(hole.prompt)} tokens, {hole.num_new_tokens} new ones "
            f"and {len(hole.suffix)} of a suffix: {hole.num_tokens} in all, more than the "
            f"{facts.max_length} that {facts.name} was trained on; lower --length or shorten it."
        )
    _check_blocks(hole, name)


def _check_blocks(hole: Hole, name: str) -> None:
    # The sampler would say so too, but only when it comes to this request.
    num_steps, length = hole.decoding.num_steps, hole.decoding.block_length
    num_blocks = 1 if length is None else -(-hole.num_new_tokens // length)
    if num_steps is not None and num_steps < num_blocks:
        raise ConfigError(
            f"--steps={num_steps} is fewer than the {num_blocks} blocks of --block-length={length} "
            f"in the {hole.num_new_tokens} new tokens of {name}: raise one of the two."
        )


def _hidden_prompt(
    guidance: tuple[int, ...] | None, length: int, mask_token_id: int, name: str
) -> tuple[int, ...]:
    """The prompt of guidance at the prompt's length: it ends where the new tokens begin."""
    if guidance is None:
        return (mask_token_id,) * length
    if len(guidance) > length:
        raise ConfigError(
            f"--guidance-prompt has {len(guidance)} tokens, more than the {length} of {name}, in "
            "whose place it stands: shorten it."
        )
    return (mask_token_id,) * (length - len(guidance)) + guidance
