"""The house may shrink and not grow: figures that were reached, in lines of code.

A line of code is one that is not blank, no comment and no part of a docstring.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "megatron_mdm"

MOST_LINES = 44_900
MOST_LINES_OF_A_ROOM = 3_960
# What `mdm train` imports, and what that imports.
MOST_LINES_BEHIND_TRAINING = 13_540
MOST_LINES_OF_A_STEP = 2_770
# As docs/architecture.md lists them.
STEP = (
    *("training/trainer", "training/hooks", "training/engine", "data/loader", "data/mixture"),
    *("data/order", "data/windows", "data/shards", "diffusion/masked_diffusion"),
    *("diffusion/noise", "diffusion/absorbing", "diffusion/masking", "diffusion/schedules"),
    *("diffusion/samples", "model/transformer", "model/layers", "model/attention"),
    *("model/attention_mask", "model/elementwise", "model/head"),
)
# Where an objective's kind may be told apart: its own files, and papers that compare the two.
KIND = re.compile(r"""\.(?:kind|objective)\s*(?:==|!=)\s*["'](?:mdm|ar)["']""")
MAY_TELL_KINDS_APART = {"checkpoint/manifest.py", "studies/papers", "studies/sweeps"}


def lines_of_code(path: Path) -> int:
    source = path.read_text(encoding="utf-8")
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        documented = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef, ast.Module)
        if isinstance(node, documented) and ast.get_docstring(node):
            first = node.body[0]
            skipped |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return sum(
        number not in skipped and bool(line.strip()) and not line.strip().startswith("#")
        for number, line in enumerate(source.splitlines(), 1)
    )


def imports_of(path: Path) -> set[Path]:
    """Files of the package that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    places = [REPO / name.replace(".", "/") for name in names if name.startswith("megatron_mdm")]
    files = [place.with_suffix(".py") for place in places]
    return {one for one in [*files, *(place / "__init__.py" for place in places)] if one.is_file()}


def closure(path: Path) -> set[Path]:
    seen: set[Path] = set()
    waiting = imports_of(path)
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            waiting |= imports_of(one)
    return seen


def test_the_package_and_its_rooms_do_not_grow():
    rooms: dict[str, int] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        # The parts of studies are rooms: they have an order of their own.
        room = "/".join(parts[:2]) if parts[0] == "studies" else parts[0]
        rooms[room] = rooms.get(room, 0) + lines_of_code(path)
    assert sum(rooms.values()) <= MOST_LINES
    assert max(rooms.values()) <= MOST_LINES_OF_A_ROOM


def test_what_training_needs_does_not_grow():
    start = PACKAGE / "training" / "command.py"
    files = {start, *closure(start)}
    assert sum(map(lines_of_code, files)) <= MOST_LINES_BEHIND_TRAINING


def test_one_step_can_be_read():
    files = [PACKAGE / f"{name}.py" for name in STEP]
    page = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [name for name in STEP if f"{name}.py" not in page] == []
    assert len(files) <= 20
    assert sum(map(lines_of_code, files)) <= MOST_LINES_OF_A_STEP


def test_no_room_asks_for_the_kind_of_an_objective():
    asking = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if KIND.search(path.read_text(encoding="utf-8"))
    }
    assert {one for one in asking if not one.startswith(tuple(MAY_TELL_KINDS_APART))} == set()


def test_files_and_functions_fit_a_screen_or_a_few():
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert (node.end_lineno or 0) - node.lineno < 90, f"{path}: {node.name}"
