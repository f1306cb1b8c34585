"""Where samples go: the standard output, a file for the report, the replay page."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import json_text, write_json_whole
from megatron_mdm.inference.generation.generator import Sample
from megatron_mdm.inference.generation.pieces import PieceReader
from megatron_mdm.inference.generation.replay import ReplayedSample, write_replay
from megatron_mdm.inference.generation.requests import Request
from megatron_mdm.inference.generation.settings import GenerationSettings
from megatron_mdm.inference.generation.text_model import TextModel
from megatron_mdm.inference.generation.trace import Trace

_TITLE_CHARACTERS = 60


class StandardOutput:
    """Writes lines to the standard output for as long as somebody reads them."""

    def __init__(self) -> None:
        self.is_open = True

    def write(self, line: str) -> None:
        """Writes a line; where the reader has gone, as `head` does, nothing happens any more.

        Args:
            line: Text, without a line feed at its end.
        """
        if not self.is_open:
            return
        try:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            self.is_open = False
            # Python would flush, and fail, once more at the end.
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())


def as_line(sample: Sample, request: Request, *, as_json: bool) -> str:
    """A sample as a line of the standard output.

    Args:
        sample: What was generated.
        request: For what.
        as_json: An object in JSON instead of the text.

    Returns:
        The line; a text may have line feeds of its own.
    """
    if not as_json:
        return sample.text
    record = {
        "request": sample.hole.request,
        "sample": sample.hole.sample,
        "prompt": request.prompt,
        "completion": sample.completion,
        "suffix": request.suffix,
        "text": sample.text,
        "ids": sample.ids,
    }
    return json_text(record)


def check_writable(path: Path, option: str) -> None:
    """Checks before the work that its result can be written.

    Args:
        path: A file to create or replace.
        option: The option that names it.

    Raises:
        ConfigError: Its folder is not there or cannot be written to, or it is a folder itself.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"{option}={path}: the folder {path.parent} does not exist; make it.")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{option}={path} cannot be written: give a file in a folder of yours.")


def write_report_entries(
    path: Path,
    samples: Sequence[Sample],
    requests: Sequence[Request],
    settings: GenerationSettings,
) -> None:
    """Writes the samples in the form that `tools/report.py` reads.

    Args:
        path: The file to create or replace.
        samples: What was generated, in the order of the requests.
        requests: For what.
        settings: How.
    """
    entries: list[dict[str, Any]] = []
    for number, members in groupby(samples, key=lambda sample: sample.hole.request):
        group = list(members)
        request = requests[number]
        shown = settings.shown(group[0].hole.decoding, group[0].hole.num_new_tokens)
        entries.append(
            {
                "kind": "prompt" if request.suffix is None else "infill",
                "prompt": request.prompt,
                "suffix": request.suffix or "",
                "completions": [sample.completion for sample in group],
                "settings": shown | {"num_samples": len(group)},
            }
        )
    write_json_whole(path, entries)


def write_page(
    path: Path,
    samples: Sequence[Sample],
    requests: Sequence[Request],
    settings: GenerationSettings,
    model: TextModel,
) -> None:
    """Writes the replay page.

    Args:
        path: The file to create or replace.
        samples: What was generated, with traces.
        requests: For what.
        settings: How.
        model: By what.
    """
    shown = [
        ReplayedSample(
            title=_title(sample, requests[sample.hole.request]),
            num_prompt_tokens=len(sample.hole.prompt),
            num_suffix_tokens=len(sample.hole.suffix),
            trace=sample.trace or Trace(sample.ids, []),
            texts=(
                requests[sample.hole.request].prompt,
                sample.completion,
                requests[sample.hole.request].suffix or "",
            ),
            settings=settings.shown(sample.hole.decoding, sample.hole.num_new_tokens),
        )
        for sample in samples
    ]
    write_replay(
        path,
        shown,
        model_name=model.facts.name,
        mask_token_id=model.facts.mask_token_id,
        pieces=PieceReader(model.tokenizer),
    )


def _title(sample: Sample, request: Request) -> str:
    words = " ".join(request.prompt.split())
    start = words if len(words) <= _TITLE_CHARACTERS else words[:_TITLE_CHARACTERS] + "\u2026"
    return f"{sample.hole.request + 1}.{sample.hole.sample + 1}  {start or '(no prompt)'}"
