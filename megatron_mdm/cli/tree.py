"""All commands of `mdm`: where each lies, what it is for, an example.

Nothing is imported before it is called for: `mdm --help` takes no engine's time.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cyclopts import App, Group

from megatron_mdm import __version__
from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import format_examples, make_app, run_app

_DESCRIPTION = "Trains masked-diffusion language models, and AR models to compare them with."
_ENGINES = ("torch", "deepspeed", "megatron-core", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class Entry:
    """A command.

    Attributes:
        target: Module below `megatron_mdm` and its function, or its `App` with subcommands.
        summary: One line.
        examples: Command lines. Those of an `App` stand beside it.
    """

    target: str
    summary: str
    examples: tuple[str, ...] = ()


TREE: dict[str, dict[str, Entry]] = {
    "Data": {
        "prepare": Entry(
            "cli.data:prepare",
            "Turns text or tokens into shards.",
            (
                "mdm prepare --input corpus/*.jsonl --tokenizer gpt2 --output-prefix data/web "
                "--valid-fraction 0.01 --workers 8",
            ),
        ),
        "prepare-finetuning": Entry(
            "cli.finetuning_data:prepare_pairs",
            "Turns conversations into shards of prompt-response pairs.",
            (
                "mdm prepare-finetuning --input chats.jsonl --tokenizer data/tokenizer "
                "--output-prefix data/chats",
            ),
        ),
        "prepare-gsm8k": Entry(
            "cli.finetuning_data:prepare_gsm8k",
            "Turns GSM8K's problems into conversations.",
            ("mdm prepare-gsm8k --split train --output data/gsm8k-train.jsonl",),
        ),
        "tokenizer": Entry("cli.tokenizers:app", "Trains a tokenizer, or converts one."),
        "inspect": Entry(
            "cli.inspection:inspect",
            "Shows and checks shards, or what a run would see of them.",
            ("mdm inspect data/web", "mdm inspect --plan run.yaml"),
        ),
        "subset": Entry(
            "cli.data:subset",
            "Makes nested subsets of unique tokens.",
            ("mdm subset --input data/web --tokens 25000000 100000000 --output-prefix data/web",),
        ),
        "slice": Entry(
            "cli.data:slice_by_key",
            "Divides a corpus by the value or date of a key.",
            ("mdm slice --input corpus.jsonl --key domain --output slices",),
        ),
        "merge": Entry(
            "cli.data:merge",
            "Makes one set of shards of an array's parts.",
            ("mdm merge --prefix data/web",),
        ),
        "gather-stdlib": Entry(
            "cli.data:gather_stdlib",
            "Gathers Python's standard library as a corpus for first tries.",
            ("mdm gather-stdlib --output data/stdlib",),
        ),
        "export-tokens": Entry(
            "cli.data:export",
            "Writes shards as the files of other programs.",
            ("mdm export-tokens --input data/web --format parquet --output web.parquet",),
        ),
    },
    "Training": {
        "init": Entry(
            "cli.starting:init",
            "Writes the configuration of a first run on shards that are there.",
            ("mdm init --train data/web --size tiny --hours 0.25 --out run.yaml",),
        ),
        "train": Entry(
            "training.command:pretrain",
            "Trains a model, or goes on with a run.",
            (
                "mdm train --config run.yaml --dry-run",
                "mdm train --config run.yaml optimizer.lr=1e-3",
            ),
        ),
        "finetune": Entry(
            "training.command:finetune",
            "Fine-tunes a model on prompt-response pairs.",
            ("mdm finetune --config chat.yaml run.initial_weights=runs/base",),
        ),
        "lora": Entry(
            "hf.adapters.command:finetune",
            "Fine-tunes adapters (LoRA) of an exported model.",
            ("mdm lora --model exported --config chat.yaml --out adapters",),
        ),
        "branch": Entry(
            "cli.starting:branch",
            "Begins a new run at a checkpoint of another: a decay, another mixture.",
            ("mdm branch --from runs/trunk --step 1000 --out runs/decay schedule.kind=wsd",),
        ),
        "average": Entry(
            "cli.averaging:average",
            "Averages the weights of saved checkpoints of a run.",
            (
                "mdm average --run runs/a --last 3 --output runs/a/mean",
                "mdm average --run runs/a --every-epoch --last 3 --output runs/a/mean",
            ),
        ),
        "convert": Entry(
            "hf.conversion.commands:app",
            "Converts checkpoints: to and from Hugging Face, and layouts.",
        ),
    },
    "Text": {
        "generate": Entry(
            "inference.generate_command:run",
            "Continues prompts, or fills in the middle.",
            ('mdm generate --model exported --prompt "Once upon" --suffix "The end." --length 32',),
        ),
        "chat": Entry(
            "inference.chat.command:run",
            "Talks with a fine-tuned model, and shows how it unmasks its answers.",
            ("mdm chat --model exported", "mdm chat --checkpoint runs/chat --system Short."),
        ),
        "evaluate": Entry(
            "inference.tasks.command:run",
            "Evaluates a model on tasks of lm-evaluation-harness.",
            ("mdm evaluate --model exported --recipe configs/eval/smdm.yaml",),
        ),
        "evaluate-math": Entry(
            "inference.math.command:run",
            "Lets a model solve problems and checks the answers.",
            ("mdm evaluate-math --model exported --data data/gsm8k-test.jsonl",),
        ),
        "perplexity": Entry(
            "inference.perplexity_command:run",
            "Perplexity of models on shards, AR and MDM token for token.",
            ("mdm perplexity --model exported --data data/web-valid",),
        ),
    },
    "Studies": {
        "plan": Entry(
            "cli.studies:plan",
            "Decides how to spend compute on a corpus: AR or MDM, size, epochs.",
            ("mdm plan --unique-tokens 1e8 --flops 1e20",),
        ),
        "estimate": Entry(
            "cli.studies:estimate",
            "Predicts memory, speed and hours on machines that are not at hand.",
            ("mdm estimate --config run.yaml --cluster h100 --gpus 64",),
        ),
        "sweep": Entry(
            "studies.sweeps.sweep_command:app",
            "Runs many configurations, here or as a SLURM array.",
        ),
        "fit": Entry(
            "cli.studies:fit",
            "Fits scaling laws to a table of runs.",
            (
                "mdm fit runs/sweep/runs.csv --objective ar --form overfitting --bootstrap 200",
                "mdm fit runs/sweep/runs.csv --objective ar --compare overfitting,data_constrained",
            ),
        ),
        "report": Entry(
            "cli.studies:report",
            "Writes the page of a run, or of several a comparison.",
            ("mdm report --run runs/a", "mdm report --run runs/a runs/b"),
        ),
        "contest": Entry(
            "studies.papers.contest_command:run_contest",
            "Tunes AR and diffusion by as many trials each, and says which is better.",
            ("mdm contest configs/fair_fight/bytes.yaml --jobs 2",),
        ),
        "tradeoff": Entry(
            "studies.papers.tradeoff_command:run_tradeoff",
            "Measures quality against speed of an MDM and an AR model.",
            (
                "mdm tradeoff --mdm exported-mdm --ar exported-ar --judge exported-judge "
                "--data data/web-valid --out runs/tradeoff",
            ),
        ),
        "benchmark": Entry(
            "studies.benchmarks.commands:app", "Measures speed and memory on this machine."
        ),
    },
}


def build_tree() -> App:
    """Makes the command line with all commands, none of them imported."""
    app = make_app(
        None,
        _DESCRIPTION,
        name="mdm",
        examples=("mdm train --config run.yaml --dry-run", "mdm generate --help"),
        version=describe_versions,
    )
    for order, (title, commands) in enumerate(TREE.items()):
        group = Group(title, sort_key=order)
        for place, (name, entry) in enumerate(commands.items()):
            target = f"megatron_mdm.{entry.target}"
            about: dict[str, Any] = {"help": entry.summary, "group": group, "sort_key": place}
            if entry.examples:
                about["help_epilogue"] = format_examples(entry.examples)
            app.command(target, name=name, **about)
    app.register_install_completion_command(
        group=Group("Shell", sort_key=len(TREE)), help="Completes commands and options with Tab."
    )
    return app


def describe_versions() -> str:
    """The versions of the project, of Python and of the engines, none of which is imported."""
    lines = [f"mdm {__version__}", f"Python {platform.python_version()}"]
    for name in _ENGINES:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"no {name}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `mdm`.

    Args:
        arguments: The command line; None: the process's.

    Returns:
        The status of the process.
    """
    return run_entry_point(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def run_door(*words: str) -> int:
    """Runs a command whose name a file of `tools/` or `pretrain/` stands for.

    Args:
        *words: The command, and what stands before the arguments of the process.

    Returns:
        The status of the process.
    """
    return main([*words, *sys.argv[1:]])


def _run(arguments: Sequence[str]) -> int:
    _show_own_log()
    status = run_app(build_tree(), arguments or ["--help"])
    return status if isinstance(status, int) else 0


class _Printer(logging.Handler):
    """Prints messages to the standard output, whichever that is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one."""
        print(record.getMessage(), flush=True)


def _show_own_log() -> None:
    # Of the engines only what warns.
    log = logging.getLogger("megatron_mdm")
    if not log.handlers:
        log.addHandler(_Printer())
        log.setLevel(logging.INFO)
