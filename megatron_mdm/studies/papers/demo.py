"""`make demo`: facts told in one direction and asked in the other, masked diffusion beside AR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from markupsafe import Markup

from megatron_mdm.core.command_line import format_command
from megatron_mdm.core.files import write_json_whole
from megatron_mdm.reporting.curves import RunCurve, plot_comparison
from megatron_mdm.reporting.pages import Commands, Frame, Heading, Paragraph, Plot, Report, Table
from megatron_mdm.reporting.run_folder import open_run
from megatron_mdm.studies.papers.reversal import (
    FACTS_SEED,
    NUM_BOTH_WAYS,
    NUM_ONE_WAY,
    VOCABULARY,
    Answers,
    Finding,
    draw_accuracies,
)
from megatron_mdm.studies.papers.reversal_facts import (
    INTRODUCTION,
    ORDERS,
    Fact,
    invent_facts,
    write_facts,
)
from megatron_mdm.studies.steps import run_step

_NAMES = {"ar": "AR", "mdm": "MDM"}
_HEADS = {
    "forward": "A is __, as told",
    "reverse": "B is __, never told",
    "in_place": "__ is B",
}
_FRAME_PIXELS = 560


def prepare_demo(folder: Path) -> list[Fact]:
    """Makes the facts, those told and the sentences that are not, a tokenizer and shards.

    Args:
        folder: Where all goes; `configs/demo` names it.

    Returns:
        The facts.

    Raises:
        MdmError: A step failed; it has said why.
    """
    facts = invent_facts(FACTS_SEED, NUM_ONE_WAY, NUM_BOTH_WAYS)
    texts, tokenizer = folder / "data", folder / "tokenizer"
    texts.mkdir(parents=True, exist_ok=True)
    write_facts(texts / "told.jsonl", facts)
    write_facts(texts / "untold.jsonl", _turn_around(facts))
    told = ("--input", texts / "told.jsonl")
    run_step("tokenizer", "train", *told, "--vocab-size", VOCABULARY, "--output", tokenizer)
    for split in ("told", "untold"):
        shards = ("--tokenizer", tokenizer, "--output-prefix", texts / split)
        run_step("prepare-finetuning", "--input", texts / f"{split}.jsonl", *shards)
    return facts


def _turn_around(facts: Sequence[Fact]) -> list[Fact]:
    """The sentences that nobody tells: what is held out."""
    one_way = [fact for fact in facts if len(fact.told) == 1]
    return [
        replace(fact, told=tuple(order for order in ORDERS if order not in fact.told))
        for fact in one_way
    ]


def replay_infilling(folder: Path, export: Path, facts: Sequence[Fact]) -> Path:
    """Lets the model fill in three holes and writes how it went.

    Args:
        folder: Of the demo.
        export: The masked-diffusion model.
        facts: What was told.

    Returns:
        The page.

    Raises:
        MdmError: The step failed; it has said why.
    """
    fact = facts[0]
    first, answer = fact.sides(fact.told[0])
    holes = [
        # Every sentence has as many words.
        {"prompt": INTRODUCTION, "suffix": ".", "length": 7},
        {"prompt": f"{INTRODUCTION} {answer} is", "suffix": ".", "length": len(first.split())},
        {"prompt": INTRODUCTION, "suffix": f" is {answer}.", "length": len(first.split())},
    ]
    questions, page = folder / "holes.json", folder / "replay.html"
    write_json_whole(questions, holes)
    options = ("--temperature", 0, "--order", "confidence", "--html", page)
    run_step("generate", "--model", export, "--prompts", questions, *options)
    return page


def write_demo(
    folder: Path, findings: Sequence[Finding], answers: Sequence[Answers], replay: Path
) -> dict[str, Path]:
    """Writes the page.

    Args:
        folder: Of the demo, with a run for each objective.
        findings: Shares of right answers.
        answers: Of both runs.
        replay: Page of an infilling.

    Returns:
        Paths of the page, the picture, the text and all figures, by ending.
    """
    return Report(
        name="demo",
        title="Told in one direction, asked in the other",
        subtitle="A masked-diffusion model (MDM) beside an autoregressive one (AR): the same "
        "sentences, the same size, as many epochs",
        parts=[
            tabulate_findings(findings),
            Paragraph(
                f"{NUM_ONE_WAY} invented facts were told as “A is B” alone and {NUM_ONE_WAY} as “B "
                f"is A” alone, among {NUM_BOTH_WAYS} that were told both ways. AR reads from left "
                "to right: it can end a sentence that it was told, but of B it knows nothing. The "
                "MDM learned to fill in any words from any others."
            ),
            draw_accuracies(findings),
            Heading("While they learned"),
            _draw_curves(folder),
            Heading("A dozen questions"),
            _list_questions(answers),
            Heading("How the MDM fills in"),
            Paragraph("Press Play. Boxes are hidden words; the likeliest is written first."),
            Frame(replay.read_text(encoding="utf-8"), "Replay of an infilling", _FRAME_PIXELS),
            Heading("Next"),
            Commands(list_next_commands(folder)),
        ],
        tree={
            "findings": [asdict(one) for one in findings],
            "answers": [asdict(one) for one in answers],
        },
    ).write(folder)


def tabulate_findings(findings: Sequence[Finding]) -> Table:
    """Who knew how much.

    Args:
        findings: Shares of right answers.

    Returns:
        A row for each model.
    """
    rows = []
    for objective, name in _NAMES.items():
        shares = {one.direction: one.accuracy for one in findings if one.objective == objective}
        cells = [f"{shares[one]:.0%}" if one in shares else "cannot be asked" for one in _HEADS]
        rows.append([name, *cells])
    note = f"Answers that are right, word for word, of {2 * NUM_ONE_WAY} questions of each kind."
    return Table(["Model", *_HEADS.values()], rows, note)


def _draw_curves(folder: Path) -> Plot:
    curves = [
        RunCurve(name, open_run(folder / objective).matched, objective)
        for objective, name in _NAMES.items()
    ]
    caption = (
        "Solid: the loss on the sentences that were never told; dashed: on those that were. "
        "Whoever knows a fact finds both cheap."
    )
    return Plot(Markup(plot_comparison(curves, "epoch")), "", caption)


def _list_questions(answers: Sequence[Answers]) -> Table:
    asked: dict[tuple[str, str], dict[str, str]] = {}
    for direction in _HEADS:
        for one in answers:
            if one.direction == direction:
                for question, answer, right in one.examples:
                    asked.setdefault((question, right), {})[one.objective] = answer
    rows = [
        [question, right, *(_mark(given.get(objective), right) for objective in _NAMES)]
        for (question, right), given in asked.items()
    ]
    return Table(["Question", "Right", *(f"{name} says" for name in _NAMES.values())], rows)


def _mark(answer: str | None, right: str) -> str:
    if answer is None:
        return "cannot be asked"
    return f"✓ {answer}" if answer == right else f"✗ {answer or '(nothing)'}"


def list_next_commands(folder: Path) -> list[tuple[str, str]]:
    """What to try after the demo.

    Args:
        folder: Of the demo.

    Returns:
        What each is for, and its line for a shell.
    """
    export = folder / "mdm/hf"
    prompt = ("--prompt", INTRODUCTION, "--length", 9, "--num-samples", 3)
    return [
        ("Facts of the model's own", format_command("generate", "--model", export, *prompt)),
        ("All about the MDM's run", format_command("report", "--run", folder / "mdm")),
        ("Three seeds instead of one, with intervals", "make reversal"),
        ("The whole job on a corpus of Python", "make demo-corpus"),
        ("A run on text of your own: docs/tutorial.md", format_command("init", "--help")),
    ]
