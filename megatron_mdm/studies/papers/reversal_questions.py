"""Asks a model about facts, in the direction in which they were told and in the other one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_mdm.inference.models import TextModel
from megatron_mdm.inference.options import make_generation_options
from megatron_mdm.inference.prompts import Prompt
from megatron_mdm.inference.sampling import generate, make_drafts
from megatron_mdm.studies.papers.reversal_facts import INTRODUCTION, ORDERS, Fact, Order

Direction = Literal["forward", "reverse", "in_place"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse", "in_place")
_BATCH = 64


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


def questions_on(facts: Sequence[Fact]) -> list[Question]:
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


def ask(model: TextModel, questions: Sequence[Question], num_tokens: int) -> list[str]:
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
