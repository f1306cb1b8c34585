"""Tables as text: for a terminal, and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

_NUMBER = re.compile(r"[-+±≥≤<]? ?[\d.]|nan|inf|-$")
Row = Sequence[str]


def format_table(heads: Row, rows: Sequence[Row], left: Collection[int] | None = None) -> list[str]:
    """Lays out a table for a terminal.

    Args:
        heads: Names of the columns.
        rows: Their cells.
        left: Columns of text, which begin on the left; None: all. Others are numbers.

    Returns:
        Lines.
    """
    cells = [heads, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if left is None or column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def format_markdown_table(heads: Row, rows: Sequence[Row]) -> str:
    """Lays out a table in Markdown, whose columns line up.

    Args:
        heads: Names of the columns.
        rows: Their cells.

    Returns:
        Lines of Markdown.
    """
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * max(width, 3) for width in widths]
    lines = (
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in (cells[0], rule, *cells[1:])
    )
    return "".join(f"| {line} |\n" for line in lines)


def find_word_columns(rows: Sequence[Row]) -> set[int]:
    """Which columns hold words alone, and are read from the left.

    Args:
        rows: Cells of a table.

    Returns:
        Their places, and that of the first column.
    """
    columns = enumerate(zip(*rows, strict=True))
    return {0} | {place for place, cells in columns if not any(map(_NUMBER.match, cells))}
