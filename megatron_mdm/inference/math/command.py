"""What mdm evaluate-math does: problems are answered, and the answers checked."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import format_json, write_json_whole, write_text_whole
from megatron_mdm.core.tables import format_markdown_table
from megatron_mdm.diffusion.decoding import derive_seeds
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.math.problems import Outcome, judge, read_problems, summarize
from megatron_mdm.inference.options import AS_THE_MODEL, DTYPES, DtypeName, GenerationOptions
from megatron_mdm.inference.prompts import Prompt
from megatron_mdm.inference.rank_pool import RankPool, join_launched_ranks
from megatron_mdm.inference.sampling import generate, make_drafts, resolve_decoding

RESULTS, TABLE, SAMPLES = "results.json", "results.md", "samples.jsonl"
_PACKAGES = ("torch", "transformers", "tokenizers", "math-verify", "sympy")
_NEW_TOKENS = 256


def run(
    *,
    model: Path,
    data: Path,
    limit: int | None = None,
    dtype: DtypeName = "float32",
    out: Path | None = None,
    options: GenerationOptions = AS_THE_MODEL,
) -> None:
    """Answers, checks, and prints a table.

    Args:
        model: Folder of an exported model.
        data: .jsonl of {prompt, response}, as mdm prepare-gsm8k writes them.
        limit: Only the first N problems.
        dtype: Of weights and passes.
        out: Folder for results.json, results.md and samples.jsonl.
        options: How answers are generated, of 256 new tokens unless --length is given.

    Raises:
        MdmError: Something does not fit, in one sentence.
    """
    if options.num_samples != 1:
        raise ConfigError(
            f"--num-samples={options.num_samples} has no meaning here, one answer per problem is "
            "checked: leave it out, and compare runs with different --seed."
        )
    if options.max_new_tokens is None:
        length: dict[str, Any] = {"max_new_tokens": _NEW_TOKENS}
        options = replace(options, **length)
    problems = read_problems(data, limit)
    with join_launched_ranks():
        answering = ExportedModel(model, DTYPES[dtype])
        facts, chosen = answering.facts, options
        if options.build_decoding(facts.decoding).temperature is None:
            # A problem has one right answer.
            best: dict[str, Any] = {"temperature": 0.0}
            chosen = replace(options, **best)
        decoding = resolve_decoding(chosen.build_decoding(facts.decoding), facts, continues=True)

        def answer(items: list[tuple[str, int]]) -> list[str]:
            """Continues prompts, each with a seed of its own."""
            prompts = [Prompt(prompt=prompt) for prompt, _ in items]
            drafts = make_drafts(prompts, chosen, facts, answering.tokenizer)
            seeded = [
                replace(draft, seed=seed) for draft, (_, seed) in zip(drafts, items, strict=True)
            ]
            samples = generate(answering, seeded, options.batch_size)
            return [sample.completion for sample in samples]

        pool = RankPool({"answer": answer})

        def work() -> None:
            # Each problem's own, wherever it is answered; those of mdm generate.
            firsts = derive_seeds(decoding.seed, len(problems))
            seeds = [derive_seeds(first, 1)[0] for first in firsts]
            prompts = [problem.prompt for problem in problems]
            texts = pool.map("answer", list(zip(prompts, seeds, strict=True)))
            outcomes = judge(problems, texts)
            figures = summarize(outcomes)
            table = _format_table(figures, model)
            sys.stdout.write(table)
            if out is not None:
                tree = {
                    "model": str(model),
                    "objective": "ar" if answering.facts.is_causal else "mdm",
                    "data": str(data),
                    "data_sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
                    "limit": limit,
                    "dtype": dtype,
                    "generation": options.list_shown(decoding),
                    **figures,
                    "versions": {name: version(name) for name in _PACKAGES},
                }
                _write(out, outcomes, table, tree)

        pool.run_on_driver(work)


def _write(folder: Path, outcomes: Sequence[Outcome], table: str, tree: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text_whole(folder / SAMPLES, "".join(map(_format_line, outcomes)))
    write_text_whole(folder / TABLE, table)
    write_json_whole(folder / RESULTS, tree)


def _format_line(outcome: Outcome) -> str:
    fields = {
        "prompt": outcome.problem.prompt,
        "text": outcome.text,
        "answer": outcome.answer.value,
        "how": outcome.answer.how,
        "reference": outcome.problem.reference,
        "is_right": outcome.is_right,
    }
    return format_json(fields) + "\n"


def _format_table(figures: dict[str, Any], model: Path) -> str:
    low, high = figures["interval_95"]
    row = {
        "model": str(model),
        "problems": f"{figures['num_problems']}",
        "right": f"{figures['accuracy']:.1%}",
        "standard error": f"{figures['standard_error']:.1%}",
        "95% interval": f"{low:.1%} to {high:.1%}",
        "after ####": f"{figures['accuracy_marked']:.1%}",
        "none": f"{figures['found'].get('none', 0)}",
    }
    return format_markdown_table([*row], [[*row.values()]])
