"""What mdm generate does: prompts in, samples out."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import format_json, write_errors, write_json_whole
from megatron_mdm.core.options import REPEATED, YES_OR_NO
from megatron_mdm.distributed.processes import read_world_size
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.models import TextModel
from megatron_mdm.inference.options import AS_THE_MODEL, GenerationOptions
from megatron_mdm.inference.output import StandardOutput, check_writable
from megatron_mdm.inference.prompts import STANDARD_INPUT, Prompt, PromptsFormat, read_prompts
from megatron_mdm.inference.replay.page import ReplayedSample, write_replay
from megatron_mdm.inference.replay.pieces import PieceReader
from megatron_mdm.inference.replay.trace import Trace
from megatron_mdm.inference.sampling import Sample, generate, make_drafts

# Text may begin with a hyphen, and a lone one is the standard input.
_TEXT = Parameter(allow_leading_hyphen=True)
_TITLE_CHARACTERS = 60


def run(
    *,
    model: Path | None = None,
    checkpoint: Path | None = None,
    tokenizer: str | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    prompt: Annotated[list[str] | None, REPEATED, _TEXT] = None,
    prompts: Annotated[Path | None, _TEXT] = None,
    prompts_format: PromptsFormat | None = None,
    suffix: Annotated[str | None, _TEXT] = None,
    options: GenerationOptions = AS_THE_MODEL,
    jsonl: bool = False,
    html: Path | None = None,
    output: Path | None = None,
    progress: Annotated[bool | None, YES_OR_NO] = None,
) -> None:
    """Generates text.

    Args:
        model: Folder of an exported model; this or --checkpoint.
        checkpoint: A checkpoint, or a run: its latest.
        tokenizer: With --checkpoint: folder, file or hub name; default: the run's.
        tensor_parallel: With --checkpoint: ranks of a layer.
        pipeline_parallel: With --checkpoint: stages.
        prompt: Text to start with; may be empty, repeatable.
        prompts: A file, .jsonl: {prompt, suffix, length} per line; .json: a list of these; else:
            one prompt per line; -: the standard input.
        prompts_format: Whatever the file's ending is.
        suffix: Text to end with, where a prompt has no suffix of its own.
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
    checkpoint_options = {
        "tokenizer": tokenizer,
        "tensor_parallel": tensor_parallel,
        "pipeline_parallel": pipeline_parallel,
    }
    with _open_model(model, checkpoint, checkpoint_options) as opened:
        drafts = make_drafts(texts, options, opened.facts, opened.tokenizer)

        def work() -> None:
            samples = generate(
                opened,
                drafts,
                options.batch_size,
                with_traces=html is not None,
                progress=progress,
            )
            kept = _print(samples, texts, jsonl, needs_all=html is not None or output is not None)
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


@contextlib.contextmanager
def _open_model(
    model: Path | None, checkpoint: Path | None, checkpoint_options: dict[str, Any]
) -> Iterator[TextModel]:
    if (model is None) == (checkpoint is None):
        raise ConfigError("There must be one model: give --model or --checkpoint.")
    if checkpoint is not None:
        if "PYTHONWARNINGS" not in os.environ:
            # Of optional packages that are not there, and of names that PyTorch has changed.
            warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
            warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        # Megatron-Core takes seconds to import; exported models do without.
        from megatron_mdm.inference.checkpoint import open_checkpoint

        with open_checkpoint(checkpoint, **checkpoint_options) as trained:
            yield trained
    elif model is not None:
        for option, value in checkpoint_options.items():
            if value not in (None, 1):
                raise ConfigError(
                    f"--{option.replace('_', '-')}={value} belongs to --checkpoint: leave it out, "
                    "or give the checkpoint instead of --model."
                )
        if read_world_size() > 1:
            raise ConfigError(
                f"--model runs in one process, but {read_world_size()} were launched: start it "
                "without a launcher, or give the checkpoint as --checkpoint."
            )
        yield ExportedModel(model)


def _print(
    samples: Iterable[Sample], prompts: Sequence[Prompt], as_json: bool, needs_all: bool
) -> list[Sample]:
    """Prints samples as they come, and returns them if files need them."""
    output, kept = StandardOutput(), []
    for sample in samples:
        output.write(_as_json(sample, prompts[sample.draft.prompt]) if as_json else sample.text)
        if needs_all:
            kept.append(sample)
        elif not output.is_open:
            break
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
