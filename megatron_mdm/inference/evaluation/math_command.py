"""The command line of tools/evaluate_math.py: problems are answered, and the answers checked."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import json_text, write_json_whole, write_text_whole
from megatron_mdm.core.tables import markdown_table
from megatron_mdm.diffusion.decoding import sequence_seeds
from megatron_mdm.inference.evaluation.math_problems import Outcome, judge, read_problems, summarize
from megatron_mdm.inference.evaluation.options import DTYPES
from megatron_mdm.inference.evaluation.rank_pool import RankPool, launched_ranks
from megatron_mdm.inference.generation.batching import make_holes
from megatron_mdm.inference.generation.exported import ExportedModel
from megatron_mdm.inference.generation.generator import generate
from megatron_mdm.inference.generation.requests import Request
from megatron_mdm.inference.generation.settings import (
    GenerationSettings,
    add_arguments,
    settings_from,
)

RESULTS, TABLE, SAMPLES = "results.json", "results.md", "samples.jsonl"
_PACKAGES = ("torch", "transformers", "tokenizers", "math-verify", "sympy")


class AnswerWorker:
    """What every rank does: answers its share.

    Args:
        model: The same on every rank.
        settings: How texts are generated.
    """

    def __init__(self, model: ExportedModel, settings: GenerationSettings) -> None:
        self._model, self._settings = model, settings

    def answer(self, items: list[tuple[str, int]]) -> list[str]:
        """Continues prompts, each with a seed of its own."""
        requests = [Request(prompt=prompt) for prompt, _ in items]
        holes = make_holes(requests, self._settings, self._model.facts, self._model.tokenizer)
        holes = [replace(hole, seed=seed) for hole, (_, seed) in zip(holes, items, strict=True)]
        samples = generate(self._model, holes, self._settings)
        return [sample.completion for sample in samples]


def add_command_line(parser: argparse.ArgumentParser) -> None:
    """Adds the options.

    Args:
        parser: An empty parser.
    """
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="exported model")
    help_ = ".jsonl of {prompt, response}, as tools/prepare_gsm8k.py writes them"
    add("--data", type=Path, required=True, metavar="FILE", help=help_)
    add("--limit", type=int, metavar="N", help="only the first N problems")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and passes (%(default)s)")
    help_ = f"folder for {RESULTS}, {TABLE} and {SAMPLES}"
    add("--out", type=Path, metavar="DIR", help=help_)
    add_arguments(parser)
    parser.set_defaults(length=256)


def run(arguments: argparse.Namespace) -> None:
    """Answers, checks, and prints a table.

    Args:
        arguments: Of `add_command_line`.

    Raises:
        MdmError: Something does not fit, in one sentence.
    """
    settings = settings_from(arguments)
    if settings.num_samples != 1:
        raise ConfigError(
            f"--num-samples={settings.num_samples} has no meaning here, an answer a problem is "
            "checked: leave it out, and compare runs with different --seed."
        )
    problems = read_problems(arguments.data, arguments.limit)
    with launched_ranks():
        model = ExportedModel(arguments.model, DTYPES[arguments.dtype])
        pool = RankPool({"answer": AnswerWorker(model, settings).answer})

        def work() -> None:
            # Each problem's own, wherever it is answered; those of tools/generate.py.
            firsts = sequence_seeds(settings.seed, len(problems))
            seeds = [sequence_seeds(first, 1)[0] for first in firsts]
            prompts = [problem.prompt for problem in problems]
            texts = pool.map("answer", list(zip(prompts, seeds, strict=True)))
            _deliver(judge(problems, texts), settings, model, arguments)

        pool.lead(work)


def _deliver(
    outcomes: Sequence[Outcome],
    settings: GenerationSettings,
    model: ExportedModel,
    arguments: argparse.Namespace,
) -> None:
    figures = summarize(outcomes)
    table = _table(figures, arguments.model)
    sys.stdout.write(table)
    if arguments.out is None:
        return
    decoding = settings.resolved(model.facts.decoding)
    tree = {
        "model": str(arguments.model),
        "objective": "ar" if model.facts.is_causal else "mdm",
        "data": str(arguments.data),
        "data_sha256": hashlib.sha256(arguments.data.read_bytes()).hexdigest(),
        "limit": arguments.limit,
        "dtype": arguments.dtype,
        "generation": settings.shown(decoding, settings.length),
        **figures,
        "versions": {name: version(name) for name in _PACKAGES},
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_text_whole(arguments.out / SAMPLES, "".join(map(_line, outcomes)))
    write_text_whole(arguments.out / TABLE, table)
    write_json_whole(arguments.out / RESULTS, tree)


def _line(outcome: Outcome) -> str:
    fields = {
        "prompt": outcome.problem.prompt,
        "text": outcome.text,
        "answer": outcome.answer.value,
        "how": outcome.answer.how,
        "reference": outcome.problem.reference,
        "is_right": outcome.is_right,
    }
    return json_text(fields) + "\n"


def _table(figures: dict[str, Any], model: Path) -> str:
    low, high = figures["interval_95"]
    heads = ["model", "problems", "right", "standard error", "95% interval", "after ####", "none"]
    row = [
        str(model),
        f"{figures['num_problems']}",
        f"{figures['accuracy']:.1%}",
        f"{figures['standard_error']:.1%}",
        f"{low:.1%} to {high:.1%}",
        f"{figures['accuracy_marked']:.1%}",
        f"{figures['found'].get('none', 0)}",
    ]
    return markdown_table(heads, [row])
