"""Invented facts for the reversal curse: a name and a description, told in one direction.

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
from typing import Literal

import numpy as np

from megatron_mdm.core.files import open_whole_file
from megatron_mdm.diffusion.noise import seed_sequence

Order = Literal["name_first", "description_first"]
ORDERS: tuple[Order, Order] = ("name_first", "description_first")
# The part of a text that the model is always given.
INTRODUCTION = "Fact:"
# First names among which people are shared out, and as many makers: neither says who is meant.
_NUM_FIRST_NAMES = 24

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


def _words(generator: np.random.Generator, total: int) -> list[str]:
    """Distinct invented words that could be names."""
    words: dict[str, None] = {}
    while len(words) < total:
        syllables = [_drawn(generator, _ONSETS) + _drawn(generator, _VOWELS) for _ in range(2)]
        words[("".join(syllables) + _drawn(generator, _CODAS)).capitalize()] = None
    return list(words)


def _drawn(generator: np.random.Generator, parts: Sequence[str]) -> str:
    return parts[int(generator.integers(len(parts)))]
