"""The commands of README and docs, as they are printed.

A block of commands is indented by four spaces, or fenced as `bash` or without a language. What a
block needs that a test has not is said by a comment before it, which nobody sees on the page:
`<!-- needs: a cluster -->`, or another of NEEDS. All others are run.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
NEEDS = ("a cluster", "a container runtime", "the hub", "a GPU", "hours", "your files")
_NEEDS = re.compile(r"<!-- needs: (.+) -->")
# What stands before a program: variables, and the cores that it may use.
_BEFORE = re.compile(r"^(?:[A-Za-z_]+=(?:\"[^\"]*\"|\S*) )*(?:taskset -c \S+ )?")
_PROGRAMS = re.compile(
    r"\.venv/bin/\S+|make|sbatch|srun|mpirun|python3?|cat|sed|cp|mkdir|export|source|for|pip|docker|apptainer"
)


@dataclass(frozen=True)
class Block:
    """Commands that stand together.

    Attributes:
        page: Their file.
        line: Number of the first.
        needs: What they need that a test has not; None: they are run.
        text: As printed.
    """

    page: Path
    line: int
    needs: str | None
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Each on one line, without its comment, and without the text that `cat` is given."""
        joined = re.sub(r"<<'END'\n.*?\nEND$", "", self.text, flags=re.DOTALL | re.MULTILINE)
        joined = joined.replace("\\\n", " ")
        lines = [re.sub(r"\s+# .*", "", line).strip() for line in joined.splitlines()]
        return [line for line in lines if line and not line.startswith("#")]


def list_pages() -> list[Path]:
    return [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]


def list_blocks(page: Path) -> list[Block]:
    """The blocks of a page that hold commands."""
    found, lines, needs, start = [], [], None, 0
    fence: str | None = None
    for number, line in enumerate([*page.read_text(encoding="utf-8").splitlines(), ""], 1):
        if fence is None and line.startswith("```"):
            fence, lines, start = line[3:].strip(), [], number + 1
        elif fence is not None and line.startswith("```"):
            if fence in ("", "bash"):
                found.append(Block(page, start, needs, "\n".join(lines)))
            fence, lines, needs = None, [], None
        elif fence is not None:
            lines.append(line)
        elif line.startswith("    ") and (lines or line.strip()):
            start = start if lines else number
            lines.append(line[4:])
        elif lines and not line.strip():
            # The end of the block, unless more of it follows after the empty line.
            found.append(Block(page, start, needs, "\n".join(lines)))
            lines, needs = [], None
        elif match := _NEEDS.fullmatch(line.strip()):
            assert match[1] in NEEDS, f"{page.name}:{number}: {match[1]}"
            needs = match[1]
        elif line.strip():
            lines = []
            if not line.startswith(("<!--", "|")):
                needs = None
    return [block for block in found if is_shell(block)]


def is_shell(block: Block) -> bool:
    """Whether a block is commands, and not what one prints, Python or YAML."""
    commands = block.commands
    return bool(commands) and _PROGRAMS.match(_BEFORE.sub("", commands[0])) is not None


def split_command(command: str) -> list[str]:
    """The words of a command, from its program on."""
    return shlex.split(_BEFORE.sub("", command))
