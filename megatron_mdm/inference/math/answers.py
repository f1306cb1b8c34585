r"""Extracts the answer from a text, and compares it with the reference.

The answer is looked for in four places, and the first that has one decides:

1. right after the first `####` that a number follows, as in GSM8K: later ones answer questions that
   the model made up;
2. in the last `\boxed{...}`;
3. after the last "answer is", "answer:" or "answer =";
4. the last number of the text.

A text without any number is wrong. Units, currencies, thousands separators and per-cent signs are
left out, so 50% is 50. No text is ever executed: math-verify gets a number, a fraction, or a short
expression of a few known commands, without powers and factorials, which could take for ever.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

How = Literal["hashes", "boxed", "phrase", "last_number", "none"]
_MAX_CHARACTERS = 60

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+"
# A sign belongs to the number only where no number or letter stands before it: 5-3 ends with 3.
_SIGN = r"(?:(?<![\w.)])[-\u2212])?"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})(?:[$\u20ac\u00a3]\s?(?P<minus>[-\u2212])?)?(?:"
    rf"(?P<whole>\d+)\s+(?P<part>\d+)\s?/\s?(?P<of>\d+)(?![\d.,]*\d)"
    rf"|(?P<top>{_DIGITS})(?:\s?/\s?(?P<bottom>\d+(?:\.\d+)?))?)"
)
_HASHES = re.compile(r"####([^\n]*)")
_PHRASE = re.compile(r"\banswer(?:\s+is\b|\s*[:=])", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{")
_ORNAMENTS = re.compile(
    r"\\(?:text|mathrm|textbf|mbox)\s*\{[^{}]*\}|\\left|\\right|\\[$%,;!: ]|[$%\u20ac\u00a3~]"
)
_COMMANDS = re.compile(r"\\(?:d|t)?frac|\\sqrt|\\pi|\\cdot|\\times")
_EXPRESSION = re.compile(r"[0-9+\-*/(){}., ]+")


class Answer(NamedTuple):
    """An answer that was found.

    Attributes:
        value: A number, a fraction or a LaTeX expression, in plain form; None: there is none.
        how: Where it was found.
    """

    value: str | None
    how: How


def find_answer(text: str) -> Answer:
    """Looks for the answer of a text.

    Args:
        text: What was generated, or a reference.

    Returns:
        The answer; see this module for the rule.
    """
    for marked in _HASHES.findall(text):
        if value := _find_leading_number(marked):
            return Answer(value, "hashes")
    boxed = _find_last_box(text)
    if boxed is not None and (value := _find_expression(boxed)):
        return Answer(value, "boxed")
    phrases = [match.end() for match in _PHRASE.finditer(text)]
    if phrases and (value := _find_first_number(text[phrases[-1] :].split("\n")[0])):
        return Answer(value, "phrase")
    values = [value for match in _NUMBER.finditer(text) if (value := _normalize(match))]
    return Answer(values[-1], "last_number") if values else Answer(None, "none")


def is_same(found: str | None, reference: str) -> bool:
    """Compares two answers as numbers.

    Args:
        found: The value of an `Answer`.
        reference: Of another.

    Returns:
        Are they equal, to six decimals? Without an answer they are not.
    """
    if found is None:
        return False
    return bool(verify(_parse(reference), _parse(found)))


def _parse(value: str) -> list[object]:
    if "\\" in value:
        found: list[object] = parse(f"${value}$", [LatexExtractionConfig()])
    else:
        found = parse(value, [ExprExtractionConfig()])
    return found


def _find_leading_number(text: str) -> str | None:
    text = text.strip()
    if _BOXED.match(text):
        return _find_first_number(text)
    match = _NUMBER.match(text)
    return None if match is None else _normalize(match)


def _find_first_number(text: str) -> str | None:
    boxed = _find_last_box(text)
    if boxed is not None:
        return _find_expression(boxed)
    match = _NUMBER.search(text)
    return None if match is None else _normalize(match)


def _normalize(match: re.Match[str]) -> str | None:
    """Normalizes a number; None if it is too long or divides by zero."""
    if len(match[0]) > _MAX_CHARACTERS:
        return None
    sign = "-" if match["sign"] or match["minus"] else ""
    if match["of"] is not None:
        whole, part, of = (int(match[name]) for name in ("whole", "part", "of"))
        return f"{sign}{whole * of + part}/{of}" if of else None
    top = match["top"].replace(",", "")
    top = f"0{top}" if top.startswith(".") else top
    if match["bottom"] is None:
        return f"{sign}{top}"
    return f"{sign}{top}/{match['bottom']}" if float(match["bottom"]) else None


def _find_expression(boxed: str) -> str | None:
    """Finds what a box holds: an expression of known commands, or else its first number."""
    value = _ORNAMENTS.sub("", boxed).strip()
    rest = _COMMANDS.sub("", value)
    if "\\" in value and len(value) <= _MAX_CHARACTERS and _EXPRESSION.fullmatch(rest or "0"):
        return value
    match = _NUMBER.search(value)
    return None if match is None else _normalize(match)


def _find_last_box(text: str) -> str | None:
    """Finds the content of the last box, its braces paired."""
    starts = [match.end() for match in _BOXED.finditer(text)]
    if not starts:
        return None
    depth = 1
    for place in range(starts[-1], len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[starts[-1] : place]
    return None
