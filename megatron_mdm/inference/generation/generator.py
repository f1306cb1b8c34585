"""From requests to samples: batches, one after the other, and what they give as text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_mdm.diffusion.samplers import Reveal
from megatron_mdm.inference.generation.batching import Hole, plan_batches
from megatron_mdm.inference.generation.settings import GenerationSettings
from megatron_mdm.inference.generation.text_model import Batch, TextModel
from megatron_mdm.inference.generation.trace import Trace, Tracer


@dataclass(frozen=True)
class Sample:
    """One generated text.

    Attributes:
        hole: What it fills.
        text: Prompt, completion and suffix, decoded together.
        completion: The new text alone, up to the token that ends it where that stops it.
        ids: All token ids.
        trace: How it came about, if that was asked for.
    """

    hole: Hole
    text: str
    completion: str
    ids: list[int]
    trace: Trace | None


def generate(
    model: TextModel,
    holes: Sequence[Hole],
    settings: GenerationSettings,
    *,
    with_traces: bool = False,
    progress: bool | None = None,
) -> Iterator[Sample]:
    """Fills holes.

    Args:
        model: The model.
        holes: Of `make_holes`.
        settings: How.
        with_traces: Keep what each step changed.
        progress: Show a bar of the steps on stderr; None: where that is a terminal.

    Yields:
        A sample for each hole, in their order, as soon as it is there.

    Raises:
        ConfigError: An option does not fit the model.
    """
    batches = list(plan_batches(holes, settings, model.facts))
    places = {(hole.request, hole.sample): index for index, hole in enumerate(holes)}
    done: dict[int, Sample] = {}
    num_given = 0
    expected = [_expected_steps(batch) for _, batch in batches]
    with tqdm(
        total=sum(expected),
        unit="step",
        file=sys.stderr,
        leave=False,
        disable=None if progress is None else not progress,
    ) as bar:
        for number, (members, batch) in enumerate(batches):
            for sample in _fill(model, members, batch, bar, with_traces):
                done[places[sample.hole.request, sample.hole.sample]] = sample
            bar.update(sum(expected[: number + 1]) - bar.n)
            while num_given in done:
                yield done.pop(num_given)
                num_given += 1


def _expected_steps(batch: Batch) -> int:
    """Steps that a batch takes if no option of the sampler saves some."""
    steps, masks = batch.decoding.num_steps, batch.num_new_tokens
    if steps is None:
        return masks
    return steps if batch.decoding.remasking else min(steps, masks)


def _fill(
    model: TextModel, holes: list[Hole], batch: Batch, bar: Any, with_traces: bool
) -> Iterator[Sample]:
    first_columns = [0] * len(holes)
    initial_BS = batch.tokens_BS
    if model.facts.is_causal:
        first_columns = [initial_BS.shape[1] - len(hole.prompt) for hole in holes]
        initial_BS = _with_masks(initial_BS, batch.num_new_tokens, model.facts.mask_token_id)
    tracer = Tracer(initial_BS, first_columns) if with_traces else None

    def follow(reveal: Reveal) -> None:
        bar.update()
        if tracer is not None:
            tracer(reveal)

    filled_BS = model.complete(batch, follow)
    for row, (hole, first) in enumerate(zip(holes, first_columns, strict=True)):
        ids = filled_BS[row, first : first + hole.num_tokens].tolist()
        if model.facts.is_causal:
            # What fills up the rest of a batch after the end of a text is none of the sample.
            ids = ids[: len(hole.prompt)] + _until_end(ids[len(hole.prompt) :], hole, 1)
        trace = None if tracer is None else tracer.trace(row, len(ids))
        yield _decoded(model.tokenizer, hole, ids, trace)


def _decoded(tokenizer: Any, hole: Hole, ids: list[int], trace: Trace | None) -> Sample:
    start, stop = len(hole.prompt), len(ids) - len(hole.suffix)
    new = _until_end(ids[start:stop], hole, 0)
    before = _decode(tokenizer, [*hole.prompt])
    # Tokens decode differently at the start of a text in some vocabularies.
    both = _decode(tokenizer, [*hole.prompt, *new])
    completion = both.removeprefix(before) if both.startswith(before) else _decode(tokenizer, new)
    text = _decode(tokenizer, [*hole.prompt, *new, *hole.suffix])
    return Sample(hole, text, completion, ids, trace)


def _until_end(new: list[int], hole: Hole, num_ends: int) -> list[int]:
    """The new tokens up to the first that ends a text, with so many of it."""
    end_token_id = hole.decoding.end_token_id
    if end_token_id is None or end_token_id not in new:
        return new
    return new[: new.index(end_token_id) + num_ends]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _with_masks(prompts_BP: Tensor, num_new_tokens: int, mask_token_id: int) -> Tensor:
    masks = torch.full((len(prompts_BP), num_new_tokens), mask_token_id)
    return torch.cat([prompts_BP, masks], dim=1)
