"""The command line of tools/generate.py."""

from __future__ import annotations

import argparse
import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.data.manifest import write_errors
from megatron_mdm.inference.generation.batching import make_holes
from megatron_mdm.inference.generation.exported import ExportedModel
from megatron_mdm.inference.generation.generator import Sample, generate
from megatron_mdm.inference.generation.output import (
    StandardOutput,
    as_line,
    check_writable,
    write_page,
    write_report_entries,
)
from megatron_mdm.inference.generation.requests import STANDARD_INPUT, Request, read_requests
from megatron_mdm.inference.generation.settings import (
    GenerationSettings,
    add_arguments,
    settings_from,
)
from megatron_mdm.inference.generation.text_model import TextModel


def add_command_line(parser: argparse.ArgumentParser) -> None:
    """Adds all options of the command.

    Args:
        parser: An empty parser.
    """
    group = parser.add_argument_group("the model")
    model = group.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, metavar="DIR", help="folder of an exported model")
    model.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="a checkpoint, or a run: its latest"
    )
    add = group.add_argument
    add("--tokenizer", help="with --checkpoint: folder, file or hub name (default: the run's)")
    add("--tensor-parallel", type=int, default=1, metavar="N", help="... ranks a layer (default 1)")
    add("--pipeline-parallel", type=int, default=1, metavar="N", help="... stages (default 1)")
    group = parser.add_argument_group("prompts")
    prompts = group.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt", action="append", metavar="TEXT", help="to start with; may be empty, repeatable"
    )
    prompts.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=".jsonl: {prompt, suffix, length} a line; .json: a list of these; else: a prompt a "
        "line; -: the standard input",
    )
    add = group.add_argument
    add("--prompts-format", choices=["jsonl", "json", "text"], help="whatever the file's ending is")
    add("--suffix", metavar="TEXT", help="to end with, where a prompt has no suffix of its own")
    add_arguments(parser)
    add = parser.add_argument_group("output").add_argument
    add("--jsonl", action="store_true", help="print an object in JSON a sample, not its text")
    add("--html", type=Path, metavar="FILE", help="also write a page that replays every step")
    add("--output", type=Path, metavar="FILE", help="also write the samples for tools/report.py")
    add(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="a bar of the steps on stderr (default: if that is a terminal)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Generates what the command line asks for.

    Args:
        arguments: Of `add_command_line`.

    Raises:
        MdmError: Something does not fit, in one sentence.
    """
    settings = settings_from(arguments)
    for path, option in ((arguments.html, "--html"), (arguments.output, "--output")):
        if path is not None:
            check_writable(path, option)
    requests = _requests(arguments)
    with _open_model(arguments) as model:
        holes = make_holes(requests, settings, model.facts, model.tokenizer)

        def work() -> None:
            samples = generate(
                model,
                holes,
                settings,
                with_traces=arguments.html is not None,
                progress=arguments.progress,
            )
            _deliver(samples, requests, settings, model, arguments)

        model.lead(work)


def _requests(arguments: argparse.Namespace) -> list[Request]:
    if arguments.prompts is None:
        if arguments.prompts_format is not None:
            raise ConfigError("--prompts-format has no effect: it belongs to --prompts.")
        requests = [Request(prompt=prompt) for prompt in arguments.prompt]
    elif arguments.prompts == STANDARD_INPUT and _num_processes() > 1:
        raise ConfigError(
            f"--prompts=- cannot be read by {_num_processes()} processes: write the prompts into "
            "a file."
        )
    else:
        requests = read_requests(arguments.prompts, arguments.prompts_format)
    if arguments.suffix is None:
        return requests
    return [
        request.model_copy(update={"suffix": arguments.suffix})
        if request.suffix is None
        else request
        for request in requests
    ]


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def _open_model(arguments: argparse.Namespace) -> Iterator[TextModel]:
    if arguments.checkpoint is not None:
        if "PYTHONWARNINGS" not in os.environ:
            # Of optional packages that are not there, and of names that PyTorch has changed.
            warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
            warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        # Megatron-Core takes seconds to import; exported models do without.
        from megatron_mdm.inference.generation.trained import open_checkpoint

        with open_checkpoint(
            arguments.checkpoint,
            tensor_parallel=arguments.tensor_parallel,
            pipeline_parallel=arguments.pipeline_parallel,
            tokenizer=arguments.tokenizer,
        ) as model:
            yield model
        return
    for option, default in (("tokenizer", None), ("tensor_parallel", 1), ("pipeline_parallel", 1)):
        if (value := getattr(arguments, option)) != default:
            raise ConfigError(
                f"--{option.replace('_', '-')}={value} belongs to --checkpoint: leave it out, or "
                "give the checkpoint instead of --model."
            )
    if _num_processes() > 1:
        raise ConfigError(
            f"--model runs in one process, but {_num_processes()} were launched: start it without "
            "a launcher, or give the checkpoint as --checkpoint."
        )
    yield ExportedModel(arguments.model)


def _deliver(
    samples: Iterable[Sample],
    requests: Sequence[Request],
    settings: GenerationSettings,
    model: TextModel,
    arguments: argparse.Namespace,
) -> None:
    output = StandardOutput()
    wants_files = arguments.html is not None or arguments.output is not None
    kept = []
    for sample in samples:
        request = requests[sample.hole.request]
        output.write(as_line(sample, request, as_json=arguments.jsonl))
        if wants_files:
            kept.append(sample)
        elif not output.is_open:
            return
    if arguments.output is not None:
        with write_errors(arguments.output):
            write_report_entries(arguments.output, kept, requests, settings)
    if arguments.html is not None:
        with write_errors(arguments.html):
            write_page(arguments.html, kept, requests, settings, model)
