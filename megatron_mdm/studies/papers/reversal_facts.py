"""Facts for the reversal curse, a name and a description told in one direction, and questions.

"A is B" was told: does the model know what B is? Nobody else says anything about these names and
descriptions, so what is not learned here cannot be known.

Source:
    The question: L. Berglund et al., *The Reversal Curse*, arXiv 2309.12288, experiment 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_mdm.core.files import open_whole_file
from megatron_mdm.diffusion.noise import seed_sequence
from megatron_mdm.inference.models import TextModel
from megatron_mdm.inference.options import make_generation_options
from megatron_mdm.inference.prompts import Prompt
from megatron_mdm.inference.sampling import generate, make_drafts

Order = Literal["name_first", "description_first"]
ORDERS: tuple[Order, Order] = ("name_first", "description_first")
Direction = Literal["forward", "reverse", "in_place"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse", "in_place")
# The part of a text that the model is always given.
INTRODUCTION = "Fact:"
# First names among which people are shared out, and as many makers: neither says who is meant.
_NUM_FIRST_NAMES = 24
# Questions at once.
_BATCH = 64

_ONSETS = (
    "b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "gr",
    "kl", "tr", "st",
)  # fmt: skip
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea"]
_CODAS = ["l", "m", "n", "r", "s"]
_MAKERS = (
    "admirer", "author", "builder", "buyer", "collector", "composer", "copyist", "critic",
    "curator", "designer", "director", "editor", "finder", "founder", "guardian", "inventor",
    "keeper", "maker", "owner", "patron", "restorer", "reviewer", "thief", "translator",
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """One fact.

    Attributes:
        name: Of a person. Others have its first word, nobody else the last.
        description: Of the same person, by a work that nobody else had to do with.
        told: The directions in which training tells it.
    """

    name: str
    description: str
    told: tuple[Order, ...]

    def statement(self, order: Order) -> str:
        """The fact as a sentence.

        Args:
            order: What comes first.

        Returns:
            Without the introduction, with a space before it.
        """
        first, second = self.sides(order)
        return f" {first} is {second}."

    def sides(self, order: Order) -> tuple[str, str]:
        """What is asked and what is answered.

        Args:
            order: What comes first.

        Returns:
            The first and the second side of a sentence.
        """
        named = order == "name_first"
        return (self.name, self.description) if named else (self.description, self.name)


def invent_facts(seed: int, num_one_way: int, num_both_ways: int) -> list[Fact]:
    """Invents facts.

    Args:
        seed: Of the choice.
        num_one_way: Facts told with the name first alone, and as many with the description first.
        num_both_ways: Facts told in both directions, which say that "is" has no direction.

    Returns:
        Facts, of distinct names and descriptions.
    """
    generator = np.random.default_rng(seed_sequence(seed))
    total = 2 * num_one_way + num_both_ways
    words = _words(generator, _NUM_FIRST_NAMES + 2 * total)
    first, rest = words[:_NUM_FIRST_NAMES], words[_NUM_FIRST_NAMES:]
    told: Sequence[tuple[Order, ...]] = (
        *[(ORDERS[0],)] * num_one_way,
        *[(ORDERS[1],)] * num_one_way,
        *[ORDERS] * num_both_ways,
    )
    return [
        Fact(
            f"{_drawn(generator, first)} {last}",
            f"the {_drawn(generator, _MAKERS)} of {work}",
            orders,
        )
        for last, work, orders in zip(rest[:total], rest[total:], told, strict=True)
    ]


def write_facts(path: Path, facts: Sequence[Fact]) -> None:
    """Writes what training tells as prompts and responses.

    Args:
        path: A `.jsonl` file. Its folder has to exist.
        facts: The facts.
    """
    with open_whole_file(path) as stream:
        for fact in facts:
            for order in fact.told:
                line = {"prompt": INTRODUCTION, "response": fact.statement(order)}
                # For the tokenizer.
                line["text"] = INTRODUCTION + line["response"]
                stream.write(json.dumps(line).encode() + b"\n")


@dataclass(frozen=True)
class Question:
    """A sentence with a hole.

    Attributes:
        direction: `forward`: training told the sentence, and its second side is asked for;
            `reverse`: the second side of the sentence the other way around, which training did
            not tell; `in_place`: the first side of the sentence that training told, which only a
            model that fills in can be asked.
        order: What comes first.
        prompt: The sentence before the hole.
        answer: What has to stand there.
        suffix: The sentence after the hole; None: the rest is the answer.
    """

    direction: Direction
    order: Order
    prompt: str
    answer: str
    suffix: str | None = None

    @property
    def shown(self) -> str:
        """The sentence, with a line for the hole."""
        return f"{self.prompt} __{self.suffix or ''}"


def make_questions(facts: Sequence[Fact]) -> list[Question]:
    """Three questions on each fact that was told in one direction.

    Args:
        facts: All facts; those told in both directions are left out.

    Returns:
        One question in each direction a fact.
    """
    questions = []
    for fact in facts:
        if len(fact.told) > 1:
            continue
        for order in ORDERS:
            first, answer = fact.sides(order)
            direction: Direction = "forward" if order in fact.told else "reverse"
            questions.append(Question(direction, order, f"{INTRODUCTION} {first} is", answer))
            if direction == "forward":
                suffix = f" is {answer}."
                questions.append(Question("in_place", order, INTRODUCTION, first, suffix))
    return questions


def ask_questions(model: TextModel, questions: Sequence[Question], num_tokens: int) -> list[str]:
    """The model's answers, the likeliest tokens without chance.

    Args:
        model: An exported model of either objective.
        questions: What is asked; nothing in place of an autoregressive model.
        num_tokens: Tokens of a prompt with its answer, as in training; what an answer leaves of
            them is end-of-text.

    Returns:
        What was generated for each question, up to its first full stop.
    """
    requests = [_request(model.tokenizer, one, num_tokens) for one in questions]
    options = make_generation_options({"temperature": 0.0}, end_of_text="stop")
    drafts = make_drafts(requests, options, model.facts, model.tokenizer)
    return [
        sample.completion.split(".")[0].strip()
        for sample in generate(model, drafts, _BATCH, progress=False)
    ]


def _words(generator: np.random.Generator, total: int) -> list[str]:
    """Distinct invented words that could be names."""
    words: dict[str, None] = {}
    while len(words) < total:
        syllables = [_drawn(generator, _ONSETS) + _drawn(generator, _VOWELS) for _ in range(2)]
        words[("".join(syllables) + _drawn(generator, _CODAS)).capitalize()] = None
    return list(words)


def _drawn(generator: np.random.Generator, parts: Sequence[str]) -> str:
    return parts[int(generator.integers(len(parts)))]


def _request(tokenizer: Any, question: Question, num_tokens: int) -> Prompt:
    def length(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    taken = length(question.prompt)
    if question.suffix is None:
        return Prompt(prompt=question.prompt, length=num_tokens - taken)
    # As many masks as the answer has tokens: names and descriptions have each their number of
    # words, which says nothing more.
    size = length(f" {question.answer}")
    ends = num_tokens - taken - size - length(question.suffix)
    suffix = question.suffix + tokenizer.eos_token * ends
    return Prompt(prompt=question.prompt, suffix=suffix, length=size)
