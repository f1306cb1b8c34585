"""What mdm generate does: prompts in, samples out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import format_json, write_errors, write_json_whole
from megatron_mdm.core.options import REPEATED, YES_OR_NO
from megatron_mdm.core.remarks import note
from megatron_mdm.distributed.processes import read_world_size
from megatron_mdm.inference.chat.telling import Teller, make_message
from megatron_mdm.inference.opening import NO_MODEL, ModelChoice
from megatron_mdm.inference.options import AS_THE_MODEL, GenerationOptions
from megatron_mdm.inference.output import StandardOutput, check_writable, print_generated
from megatron_mdm.inference.prompts import STANDARD_INPUT, Prompt, PromptsFormat, read_prompts
from megatron_mdm.inference.repetition import RepetitionWatch
from megatron_mdm.inference.replay.page import ReplayedSample, write_replay
from megatron_mdm.inference.replay.pieces import PieceReader
from megatron_mdm.inference.replay.trace import Trace
from megatron_mdm.inference.sampling import Sample, generate, make_drafts

# Text may begin with a hyphen, and a lone one is the standard input.
_TEXT = Parameter(allow_leading_hyphen=True)
_TITLE_CHARACTERS = 60


def run(
    *,
    choice: ModelChoice = NO_MODEL,
    prompt: Annotated[list[str] | None, REPEATED, _TEXT] = None,
    prompts: Annotated[Path | None, _TEXT] = None,
    prompts_format: PromptsFormat | None = None,
    suffix: Annotated[str | None, _TEXT] = None,
    chat: bool = False,
    options: GenerationOptions = AS_THE_MODEL,
    jsonl: bool = False,
    html: Path | None = None,
    output: Path | None = None,
    progress: Annotated[bool | None, YES_OR_NO] = None,
) -> None:
    """Generates text.

    Args:
        choice: The model.
        prompt: Text to start with; may be empty, repeatable.
        prompts: A file, .jsonl: {prompt, suffix, length} per line; .json: a list of these; else:
            one prompt per line; -: the standard input.
        prompts_format: Whatever the file's ending is.
        suffix: Text to end with, where a prompt has no suffix of its own.
        chat: Tell each prompt with the model's chat template, as a user's message.
        options: What is generated, and how.
        jsonl: Print an object in JSON for each sample, not its text.
        html: Also write a page that replays every step.
        output: Also write the samples for mdm report.
        progress: A bar of the steps on stderr; default: if that is a terminal.

    Raises:
        MdmError: Something does not fit, in one sentence.
    """
    for path, option in ((html, "--html"), (output, "--output")):
        if path is not None:
            check_writable(path, option)
    texts = _read_prompts(prompt, prompts, prompts_format, suffix)
    with choice.open() as opened:
        if chat:
            texts = _tell_as_user(texts, Teller(choice.open_template(), opened.tokenizer))
        drafts = make_drafts(texts, options, opened.facts, opened.tokenizer)

        def work() -> None:
            samples = generate(
                opened,
                drafts,
                options.batch_size,
                with_traces=html is not None,
                progress=progress,
            )
            watch = RepetitionWatch(opened.facts.corpus_nats)
            needs_all = html is not None or output is not None
            kept = _print(samples, texts, watch, jsonl, needs_all)
            if output is not None:
                with write_errors(output):
                    write_json_whole(output, _list_report_entries(kept, texts, options))
            if html is not None:
                with write_errors(html):
                    write_replay(
                        html,
                        [_replay(one, texts[one.draft.prompt], options) for one in kept],
                        model_name=opened.facts.name,
                        mask_token_id=opened.facts.mask_token_id,
                        pieces=PieceReader(opened.tokenizer),
                    )

        opened.run_on_driver(work)


def _read_prompts(
    given: Sequence[str] | None, path: Path | None, form: PromptsFormat | None, suffix: str | None
) -> list[Prompt]:
    if (given is None) == (path is None):
        raise ConfigError("There must be prompts from one place: give --prompt or --prompts.")
    if path is None:
        if form is not None:
            raise ConfigError("--prompts-format has no effect: it belongs to --prompts.")
        texts = [Prompt(prompt=prompt) for prompt in given or ()]
    elif path == STANDARD_INPUT and read_world_size() > 1:
        raise ConfigError(
            f"--prompts=- cannot be read by {read_world_size()} processes: write the prompts into "
            "a file."
        )
    else:
        texts = read_prompts(path, form)
    return [
        text.model_copy(update={"suffix": suffix}) if text.suffix is None else text
        for text in texts
    ]


def _tell_as_user(prompts: Sequence[Prompt], teller: Teller) -> list[Prompt]:
    return [
        one.model_copy(update={"prompt": teller.tell([make_message("user", one.prompt)])})
        for one in prompts
    ]


def _print(
    samples: Iterable[Sample],
    prompts: Sequence[Prompt],
    watch: RepetitionWatch,
    as_json: bool,
    needs_all: bool,
) -> list[Sample]:
    """Prints samples as they come, and returns them if files need them."""
    output, kept = StandardOutput(), []
    sample = None
    for sample in samples:
        if as_json:
            output.write(_as_json(sample, prompts[sample.draft.prompt]))
        else:
            stop = sample.start + len(sample.completion)
            print_generated(output, sample.text, sample.start, stop)
        watch.add(sample.new_ids)
        if needs_all:
            kept.append(sample)
        elif not output.is_open:
            break
    if sample is not None and output.is_open:
        remark = watch.remark(sample.draft.decoding, lambda name, value: f"--{name} {value}")
        if remark is not None:
            note(remark)
    return kept


def _as_json(sample: Sample, prompt: Prompt) -> str:
    return format_json(
        {
            "request": sample.draft.prompt,
            "sample": sample.draft.sample,
            "prompt": prompt.prompt,
            "completion": sample.completion,
            "suffix": prompt.suffix,
            "text": sample.text,
            "ids": sample.ids,
        }
    )


def _list_report_entries(
    samples: Sequence[Sample], prompts: Sequence[Prompt], options: GenerationOptions
) -> list[dict[str, Any]]:
    """The samples in the form that `mdm report` reads."""
    entries: list[dict[str, Any]] = []
    for number, members in groupby(samples, key=lambda sample: sample.draft.prompt):
        group, prompt = list(members), prompts[number]
        shown = options.list_shown(group[0].draft.decoding)
        entries.append(
            {
                "kind": "prompt" if prompt.suffix is None else "infill",
                "prompt": prompt.prompt,
                "suffix": prompt.suffix or "",
                "completions": [sample.completion for sample in group],
                "settings": shown | {"num_samples": len(group)},
            }
        )
    return entries


def _replay(sample: Sample, prompt: Prompt, options: GenerationOptions) -> ReplayedSample:
    draft = sample.draft
    words = " ".join(prompt.prompt.split())
    start = words if len(words) <= _TITLE_CHARACTERS else words[:_TITLE_CHARACTERS] + "\u2026"
    return ReplayedSample(
        title=f"{draft.prompt + 1}.{draft.sample + 1}  {start or '(no prompt)'}",
        num_prompt_tokens=len(draft.request.context),
        num_suffix_tokens=len(draft.request.suffix),
        trace=sample.trace or Trace(sample.ids, []),
        texts=(prompt.prompt, sample.completion, prompt.suffix or ""),
        settings=options.list_shown(draft.decoding),
    )
