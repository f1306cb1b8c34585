"""Facts, questions in both directions, and what is made of the answers."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from sweep_examples import STEPS, write_sweep
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_mdm.core.errors import DataError
from megatron_mdm.diffusion.decoding import Decoding
from megatron_mdm.inference.models import ModelFacts
from megatron_mdm.studies.papers.reversal import (
    Answers,
    ask_runs,
    summarize_answers,
    tabulate_accuracies,
    write_reversal,
)
from megatron_mdm.studies.papers.reversal_facts import (
    DIRECTIONS,
    INTRODUCTION,
    ORDERS,
    ask_questions,
    invent_facts,
    make_questions,
    write_facts,
)

FACTS = invent_facts(0, 6, 4)


def test_facts_are_distinct_and_a_function_of_the_seed():
    assert invent_facts(0, 6, 4) == FACTS
    assert invent_facts(1, 6, 4) != FACTS
    many = invent_facts(0, 100, 300)
    assert len({one.name for one in many}) == len({one.description for one in many}) == 500
    assert Counter(one.told for one in many) == {ORDERS[:1]: 100, ORDERS[1:]: 100, ORDERS: 300}
    # Last names and works are the person's own, first names and roles are shared out.
    for words in ([one.name for one in many], [one.description for one in many]):
        assert len({word.split()[-1] for word in words}) == 500
        assert len({word.rsplit(" ", 1)[0] for word in words}) == 24
    # No word stands for two things.
    assert not {one.name.split()[-1] for one in many} & {
        one.description.split()[-1] for one in many
    }


def test_training_tells_a_fact_in_its_own_directions_alone(tmp_path):
    write_facts(tmp_path / "facts.jsonl", FACTS)
    lines = [json.loads(line) for line in (tmp_path / "facts.jsonl").read_text().splitlines()]
    assert len(lines) == 6 + 6 + 2 * 4
    told = {line["response"] for line in lines}
    for fact in FACTS:
        for order in ORDERS:
            assert (fact.statement(order) in told) == (order in fact.told)
    assert all(line["prompt"] == INTRODUCTION for line in lines)
    # No reverse question stands anywhere in the text, with its answer or without.
    text = "\n".join(line["text"] for line in lines)
    for question in make_questions(FACTS):
        asked = question.prompt
        if question.direction == "in_place":
            asked = f"{question.prompt} {question.answer}{question.suffix}"
        assert (asked in text) == (question.direction != "reverse")


def test_questions_ask_each_one_way_fact_once_in_each_direction():
    questions = make_questions(FACTS)
    assert Counter((one.direction, one.order) for one in questions) == {
        (direction, order): 6 for direction in DIRECTIONS for order in ORDERS
    }
    first = FACTS[0]
    assert (questions[0].prompt, questions[0].answer) == (
        f"Fact: {first.name} is",
        first.description,
    )
    assert questions[1].suffix == f" is {first.description}."
    assert questions[1].shown == f"Fact: __ is {first.description}."
    assert (questions[1].prompt, questions[1].answer) == ("Fact:", first.name)
    assert (questions[2].prompt, questions[2].answer) == (
        f"Fact: {first.description} is",
        first.name,
    )


class Oracle:
    """Answers as the curse has it: what was told, and nothing the other way around."""

    def __init__(self):
        words = sorted(
            {word for one in FACTS for word in (*one.name.split(), *one.description.split())}
        )
        vocabulary = {
            word: place for place, word in enumerate(["<end>", ".", *words, "Fact:", "is"])
        }
        backend = Tokenizer(models.WordLevel(vocabulary))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(".", "isolated")]
        )
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
        self.told = {
            one.prompt: one.answer for one in make_questions(FACTS) if one.direction == "forward"
        }
        self.facts = ModelFacts(
            name="an oracle",
            is_causal=False,
            vocab_size=len(vocabulary),
            mask_token_id=len(vocabulary),
            max_length=24,
            end_token_id=0,
            aligns_prompts=True,
            has_cache=False,
            decoding=Decoding(),
        )

    def complete(self, batch, callback=None):
        filled = batch.tokens_BS.clone()
        for row in filled:
            holes = (row == self.facts.mask_token_id).nonzero()[:, 0]
            prompt = self.tokenizer.decode(row[: holes[0]])
            answer = self.told.get(prompt, "nobody")
            ids = self.tokenizer(f"{answer} .")["input_ids"] if answer != "nobody" else [1]
            row[holes] = torch.tensor([*ids, *[0] * len(holes)])[: len(holes)]
        return filled

    def run_on_driver(self, work):
        work()


def test_answers_are_what_stands_before_the_full_stop():
    questions = [one for one in make_questions(FACTS) if one.suffix is None]
    answers = ask_questions(Oracle(), questions, num_tokens=20)
    for question, answer in zip(questions, answers, strict=True):
        assert (answer == question.answer) == (question.direction == "forward")
        assert answer == (question.answer if question.direction == "forward" else "")


def test_in_place_the_hole_is_as_long_as_the_answer_and_ends_follow():
    oracle = Oracle()
    seen = []

    def complete(batch, callback=None):
        seen.append(batch.tokens_BS)
        return torch.where(batch.tokens_BS == oracle.facts.mask_token_id, 1, batch.tokens_BS)

    oracle.complete = complete
    chosen = [one for one in make_questions(FACTS) if one.direction == "in_place"]
    ask_questions(oracle, chosen, num_tokens=20)
    rows = {tuple(row) for tokens_BS in seen for row in tokens_BS.tolist()}
    expected = set()
    for one in chosen:
        size = len(one.answer.split())
        ids = oracle.tokenizer(f"Fact: {one.suffix.strip()}")["input_ids"]
        row = [ids[0], *[oracle.facts.mask_token_id] * size, *ids[1:]]
        expected.add((*row, *[0] * (20 - len(row))))
    assert rows == expected


def answers_of(objective, seed, direction, right):
    examples = (("Fact: A is", "b" if right else "", "b"),)
    return Answers(objective, seed, direction, right, 80, examples)


ANSWERS = [
    answers_of(objective, seed, direction, right)
    for objective, direction, counts in (
        ("ar", "forward", (80, 79, 80)),
        ("ar", "reverse", (0, 1, 0)),
        ("mdm", "forward", (78, 80, 80)),
        ("mdm", "reverse", (70, 60, 80)),
    )
    for seed, right in enumerate(counts)
]


def test_accuracies_are_over_all_runs_with_wilson_intervals(tmp_path):
    findings = summarize_answers(ANSWERS)
    assert [(one.objective, one.direction) for one in findings] == [
        ("ar", "forward"),
        ("ar", "reverse"),
        ("mdm", "forward"),
        ("mdm", "reverse"),
    ]
    reverse = findings[1]
    assert reverse.accuracy == 1 / 240
    assert reverse.of_runs == {0: 0.0, 1: 1 / 80, 2: 0.0}
    # Wilson's interval by hand.
    z, n, p = 1.959963984540054, 240, 1 / 240
    middle, reach = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    for found, sign in zip(reverse.interval, (-1, 1), strict=True):
        assert found == pytest.approx((middle + sign * reach) / (1 + z * z / n))
    assert "| MDM   | reverse | 87.5%" in tabulate_accuracies(findings).to_markdown()
    paths = write_reversal(tmp_path / "out", findings, ANSWERS)
    for ending in ("md", "html"):
        assert "(nothing)" in paths[ending].read_text()
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    assert json.loads(paths["json"].read_text())["findings"][0]["accuracy"] == 239 / 240


def test_no_answers_are_no_finding():
    with pytest.raises(DataError, match="let the sweep finish a run"):
        summarize_answers([])


def test_before_any_run_the_remedy_is_to_train(tmp_path):
    write_sweep(tmp_path, axes={"run.seed": [0, 1]})
    (tmp_path / "train.idx").unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"^2 of 2 runs have .*: leave out --report-only, or run"):
        ask_runs(tmp_path / "sweep.yaml", FACTS)


def test_runs_that_have_not_come_to_their_end_are_not_asked(tmp_path):
    first, second, _ = write_sweep(tmp_path, axes={"run.seed": [0, 1, 2]}).runs
    for run, step in ((first, STEPS), (second, STEPS - 1)):
        run.folder.mkdir(parents=True)
        ledger = {"step": step, "num_steps": STEPS, "planned": [{"num_windows": 10}]}
        (run.folder / "ledger.json").write_text(json.dumps(ledger))
    with pytest.raises(DataError, match=r"^2 of 3 runs have .* in .*seed-1: "):
        ask_runs(tmp_path / "sweep.yaml", FACTS)
    assert not (first.folder / "hf").exists()
