"""Every command of README and docs names commands, options, targets and files that are there."""

from __future__ import annotations

import re

import pytest
from cyclopts import CycloptsError
from documented import REPO, list_blocks, list_pages, split_command

from megatron_mdm.cli.tree import build_tree

APP = build_tree()
# What the doors stand for.
DOORS = {
    path.relative_to(REPO).as_posix(): re.findall(r'"([a-z][a-z0-9-]*)"', match[1])
    for folder in ("tools", "pretrain")
    for path in (REPO / folder).glob("*.py")
    if (match := re.search(r"(?:run_door\(|main\(\[)(.*?)[\)\]]", path.read_text()))
}
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (REPO / "Makefile").read_text(), re.MULTILINE))
COMMANDS = [
    pytest.param(command, id=f"{block.name} {command[:60]}")
    for page in list_pages()
    for block in list_blocks(page)
    for command in block.commands
]


def test_the_pages_have_commands():
    assert len(COMMANDS) > 100
    assert DOORS["tools/convert_checkpoint.py"] == ["convert"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one(command):
    for part in command.split(" && "):
        words = split_command(part)
        check(words)


def check(words):
    # Its placeholders are numbers where numbers belong.
    words = [{"N": "4"}.get(word, word) for word in words if word != "..."]
    if words[0] == "make":
        assert set(words[1:]) <= TARGETS | {word for word in words[1:] if "=" in word}
        return
    script = next((place for place, word in enumerate(words) if word in DOORS), None)
    if words[0].endswith("/mdm"):
        parse(words[1:])
    elif script is not None and words[0] != "sbatch":
        parse([*DOORS[words[script]], *words[script + 1 :]])
    for word in words:
        if re.match(r"(configs|tools|pretrain|tests)/[\w./-]+$", word):
            assert (REPO / word).exists(), word


def parse(words):
    if words[-1] == "--help":
        words = words[:-1]
        APP[words[0]]
        return
    # `mdm sweep submit FILE OPTIONS OF SBATCH` and others take any.
    try:
        APP.parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise AssertionError(" ".join(str(error).split())) from None
