"""From prompts and suffixes to samples: requests, batches, and what they give as text.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.diffusion.block_steps import plan_block_steps
from megatron_mdm.diffusion.decoding import Decoding, derive_seeds
from megatron_mdm.diffusion.samplers import SamplingStep, StepCallback
from megatron_mdm.inference.batching import cut_batches
from megatron_mdm.inference.models import ModelFacts, SamplingBatch, TextModel
from megatron_mdm.inference.options import GenerationOptions
from megatron_mdm.inference.prompts import Prompt
from megatron_mdm.inference.replay.trace import Trace, Tracer
from megatron_mdm.inference.requests import Request, check_request


@dataclass(frozen=True)
class Draft:
    """A request for one sample.

    Attributes:
        request: What is given, and mask tokens where new ones go.
        decoding: How.
        seed: Decides its random numbers.
        prompt: Number of its prompt, from 0.
        sample: Number among the samples of that prompt, from 0.
        guidance: What the other pass of guidance sees of the whole sequence; None without guidance.
    """

    request: Request
    decoding: Decoding
    seed: int
    prompt: int = 0
    sample: int = 0
    guidance: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Sample:
    """One generated text.

    Attributes:
        draft: The request that it answers.
        text: Prompt, completion and suffix, decoded together.
        completion: The new text alone, up to the token that ends it where that stops it.
        start: Characters of the text before the completion.
        ids: All token ids.
        new_ids: Those of the completion.
        trace: How it came about, if that was asked for.
    """

    draft: Draft
    text: str
    completion: str
    start: int
    ids: list[int]
    new_ids: list[int]
    trace: Trace | None


def make_drafts(
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    facts: ModelFacts,
    tokenizer: Any,
    *,
    cut_prompts: bool = False,
) -> list[Draft]:
    """Encodes all prompts and checks that the model can do them.

    Args:
        prompts: The texts.
        options: How.
        facts: What the model can do.
        tokenizer: The model's, of transformers.
        cut_prompts: Leave out the start of a prompt that is too long, instead of refusing it.

    Returns:
        `num_samples` drafts for each prompt, in their order.

    Raises:
        MdmError: A prompt or an option does not fit the model.
    """

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    decoding = options.build_decoding(facts.decoding)
    _check_options(options, decoding, facts)
    unconditional = None if options.guidance_prompt is None else encode(options.guidance_prompt)
    drafts = []
    seeds = derive_seeds(decoding.seed, len(prompts))
    for number, prompt in enumerate(prompts):
        context, suffix = encode(prompt.prompt), encode(prompt.suffix or "")
        num_new = prompt.length or decoding.max_new_tokens
        room = facts.max_length - num_new - len(suffix)
        if cut_prompts and len(context) > room > 0:
            context = context[-room:]
        request = Request(context, (facts.mask_token_id,) * num_new, suffix)
        name = f"Prompt {number + 1}"
        own = _choose_end(decoding, options, facts, prompt.suffix is not None)
        own = replace(own, max_new_tokens=num_new)
        own = resolve_decoding(own, facts, continues=prompt.suffix is None)
        _check_prompt(prompt, request, own, facts, name)
        guidance = None
        if own.guidance_scale != 0.0:
            guidance = _make_unconditional(request, unconditional, facts.mask_token_id, name)
        drafts += [
            Draft(request, own, seed, number, sample, guidance)
            for sample, seed in enumerate(derive_seeds(seeds[number], options.num_samples))
        ]
    return drafts


def resolve_decoding(decoding: Decoding, facts: ModelFacts, *, continues: bool) -> Decoding:
    """Decides what options leave open.

    Args:
        decoding: The options.
        facts: Of the model.
        continues: The text is continued, and no suffix follows.

    Returns:
        Options with a temperature, and for masked diffusion with an order.

    Raises:
        ConfigError: An option is for other noise.
    """
    if facts.noise is not None:
        try:
            return decoding.resolve_noise(has_masks=facts.noise.at(0.5).mask > 0)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    resolved = decoding.resolve(continues=continues)
    return replace(resolved, order=decoding.order) if facts.is_causal else resolved


def plan_batches(
    drafts: Sequence[Draft], batch_size: int, facts: ModelFacts
) -> Iterator[tuple[list[Draft], SamplingBatch]]:
    """Batches drafts of similar size.

    Args:
        drafts: What to make.
        batch_size: How many at once, at most.
        facts: What a batch may hold.

    Yields:
        The drafts of a batch, and the batch.
    """

    def group(draft: Draft) -> tuple[int, ...]:
        stops = int(draft.decoding.end_token_id is not None)
        if not facts.is_causal:
            return (stops,)
        length = 0 if facts.aligns_prompts else len(draft.request.context)
        return stops, draft.decoding.max_new_tokens, length

    def measure(draft: Draft) -> tuple[int, ...]:
        return *group(draft), draft.decoding.max_new_tokens, draft.request.length

    waiting = sorted(drafts, key=measure)
    lengths = [draft.request.length for draft in waiting]
    groups = [group(draft) for draft in waiting]
    for places in cut_batches(lengths, groups=groups, max_rows=batch_size):
        yield waiting[places], _make_batch(waiting[places], facts)


def _make_batch(drafts: list[Draft], facts: ModelFacts) -> SamplingBatch:
    if facts.is_causal:
        rows = [[*draft.request.context] for draft in drafts]
    else:
        rows = [[token for part in draft.request for token in part] for draft in drafts]
    width = max(map(len, rows))

    def pad(values: Sequence[int], filler: int) -> torch.Tensor:
        spare = width - len(values)
        ends = (spare, 0) if facts.is_causal else (0, spare)
        return F.pad(torch.tensor(values, dtype=torch.int64), ends, value=filler)

    # Any token but the mask, which would be unmasked.
    filler = 0 if facts.mask_token_id else 1
    others = [draft.guidance for draft in drafts if draft.guidance is not None]
    longest = max(draft.decoding.max_new_tokens for draft in drafts)
    return SamplingBatch(
        tokens_BS=torch.stack([pad(row, filler) for row in rows]),
        is_real_BS=torch.stack([pad([1] * len(row), 0) for row in rows]).bool(),
        guidance_BS=torch.stack([pad(row, filler) for row in others]) if others else None,
        seeds=[draft.seed for draft in drafts],
        decoding=replace(drafts[0].decoding, max_new_tokens=longest),
    )


def generate(
    model: TextModel,
    drafts: Sequence[Draft],
    batch_size: int,
    *,
    with_traces: bool = False,
    progress: bool | None = None,
    callback: StepCallback | None = None,
) -> Iterator[Sample]:
    """Makes samples.

    Args:
        model: The model.
        drafts: Of `make_drafts`.
        batch_size: Most samples of a forward pass.
        with_traces: Keep what each step changed.
        progress: Show a bar of the steps on stderr; None: where that is a terminal.
        callback: Called after every step of each batch.

    Yields:
        A sample for each draft, in their order, as soon as it is there.

    Raises:
        ConfigError: An option does not fit the model.
    """
    batches = list(plan_batches(drafts, batch_size, model.facts))
    places = {(draft.prompt, draft.sample): index for index, draft in enumerate(drafts)}
    done: dict[int, Sample] = {}
    num_given = 0
    expected = [_count_expected_steps(batch.decoding) for _, batch in batches]
    with tqdm(
        total=sum(expected),
        unit="step",
        file=sys.stderr,
        leave=False,
        disable=None if progress is None else not progress,
    ) as bar:
        for number, (members, batch) in enumerate(batches):
            for sample in _complete(model, members, batch, bar, with_traces, callback):
                done[places[sample.draft.prompt, sample.draft.sample]] = sample
            bar.update(sum(expected[: number + 1]) - bar.n)
            while num_given in done:
                yield done.pop(num_given)
                num_given += 1


def _count_expected_steps(decoding: Decoding) -> int:
    """Steps that a batch takes if no option of the sampler saves some."""
    steps, masks = decoding.num_steps, decoding.max_new_tokens
    if steps is None:
        return masks
    is_revised = decoding.remasking or decoding.order == "ancestral"
    return steps if is_revised else min(steps, masks)


def _complete(
    model: TextModel,
    drafts: list[Draft],
    batch: SamplingBatch,
    bar: Any,
    with_traces: bool,
    callback: StepCallback | None,
) -> Iterator[Sample]:
    facts, initial_BS = model.facts, batch.tokens_BS
    first_columns = [0] * len(drafts)
    if facts.is_causal:
        first_columns = [initial_BS.shape[1] - len(draft.request.context) for draft in drafts]
        num_new = batch.decoding.max_new_tokens
        initial_BS = F.pad(initial_BS, (0, num_new), value=facts.mask_token_id)
    tracer = Tracer(initial_BS, first_columns) if with_traces else None

    def follow(step: SamplingStep) -> None:
        bar.update()
        if tracer is not None:
            tracer(step)
        if callback is not None:
            callback(step)

    sampled_BS = model.complete(batch, follow)
    for row, (draft, first) in enumerate(zip(drafts, first_columns, strict=True)):
        ids = sampled_BS[row, first : first + draft.request.length].tolist()
        if facts.is_causal:
            # Another sequence of the batch may have gone on for longer.
            start = len(draft.request.context)
            ids = ids[:start] + _cut_at_end(ids[start:], draft, 1)
        trace = None if tracer is None else tracer.trace(row, len(ids))
        yield _as_text(draft, ids, model.tokenizer, trace)


def _as_text(draft: Draft, ids: list[int], tokenizer: Any, trace: Trace | None) -> Sample:
    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode([*tokens], clean_up_tokenization_spaces=False))

    context, _, suffix = draft.request
    new = _cut_at_end(ids[len(context) : len(ids) - len(suffix)], draft, 0)
    before = decode(context)
    # Tokens decode differently at the start of a text in some vocabularies.
    both = decode([*context, *new])
    completion = both.removeprefix(before) if both.startswith(before) else decode(new)
    whole = decode([*context, *new, *suffix])
    return Sample(draft, whole, completion, len(before), ids, new, trace)


def _cut_at_end(new: list[int], draft: Draft, num_ends: int) -> list[int]:
    """Cuts the new tokens at the first that ends a text, of which so many are kept."""
    end_token_id = draft.decoding.end_token_id
    if end_token_id is None or end_token_id not in new:
        return new
    return new[: new.index(end_token_id) + num_ends]


def _choose_end(
    decoding: Decoding, options: GenerationOptions, facts: ModelFacts, has_suffix: bool
) -> Decoding:
    """Chooses what the token that ends a text does."""
    stops = decoding.stop_at_end and not has_suffix
    end = options.end_of_text or ("stop" if stops else "keep")
    if facts.end_token_id is not None and end == "stop":
        return replace(decoding, end_token_id=facts.end_token_id, stop_at_end=True)
    forbidden = decoding.forbidden_token_ids
    if facts.end_token_id is not None and end == "forbid":
        forbidden = (*forbidden, facts.end_token_id)
    return replace(decoding, end_token_id=None, stop_at_end=False, forbidden_token_ids=forbidden)


def _check_options(options: GenerationOptions, decoding: Decoding, facts: ModelFacts) -> None:
    if options.end_of_text in ("stop", "forbid") and facts.end_token_id is None:
        raise ConfigError(
            f"--end-of-text={options.end_of_text} needs a token that ends texts, but "
            f"{facts.name} names none: leave it out."
        )
    if decoding.use_cache and not facts.has_cache:
        raise ConfigError(
            "--cache works with exported models only: leave it out, or export the checkpoint with "
            "mdm convert and give --model."
        )
    if facts.is_causal:
        try:
            decoding.check_autoregressive()
        except ValueError as error:
            raise ConfigError(str(error)) from None


def _check_prompt(
    prompt: Prompt, request: Request, decoding: Decoding, facts: ModelFacts, name: str
) -> None:
    if facts.is_causal and prompt.suffix is not None:
        raise ConfigError(
            f"{name} has a suffix, but {facts.name} is autoregressive and only continues texts: "
            "leave the suffix out."
        )
    check_request(request, facts, name)
    try:
        # The sampler would say so too, but only when it comes to this prompt.
        plan_block_steps(len(request.continuation), decoding)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def _make_unconditional(
    request: Request, instead: tuple[int, ...] | None, mask_token_id: int, name: str
) -> tuple[int, ...]:
    """Makes the tokens of guidance's other pass: masks, or a text that ends with the prompt."""
    if instead is None:
        return (mask_token_id,) * request.length
    spare = len(request.context) - len(instead)
    if spare < 0:
        raise ConfigError(
            f"--guidance-prompt has {len(instead)} tokens, more than the {len(request.context)} of "
            f"{name}, in whose place it stands: shorten it."
        )
    return (*(mask_token_id,) * spare, *instead, *request.continuation, *request.suffix)
