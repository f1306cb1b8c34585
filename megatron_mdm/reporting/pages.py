"""Pages of text, tables and plots: HTML that needs nothing but itself, and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from markupsafe import Markup
from matplotlib.figure import Figure

from megatron_mdm.core import pages
from megatron_mdm.core.files import write_json_whole, write_text_whole
from megatron_mdm.core.tables import Row, format_markdown_table
from megatron_mdm.reporting.figures import render_svg, save_figure


@dataclass(frozen=True)
class Plot:
    """A plot of a page.

    Attributes:
        svg: The SVG element.
        title: Heading of the plot.
        caption: What is drawn and how.
    """

    svg: Markup
    title: str
    caption: str
    kind: ClassVar[str] = "plot"


@dataclass(frozen=True)
class Picture:
    """The figure of a report that says most, and what it shows."""

    figure: Figure
    caption: str


@dataclass(frozen=True)
class Heading:
    """The heading of what follows."""

    text: str
    kind: ClassVar[str] = "heading"

    def to_markdown(self) -> str:
        """As Markdown."""
        return f"## {self.text}\n"


@dataclass(frozen=True)
class Paragraph:
    """Sentences; `is_warning` marks them."""

    text: str
    is_warning: bool = False
    kind: ClassVar[str] = "paragraph"

    def to_markdown(self) -> str:
        """As Markdown."""
        return f"{self.text}\n"


@dataclass(frozen=True)
class Table:
    """A table of figures.

    Attributes:
        heads: Names of the columns.
        rows: Their cells; the first of a row is its name.
        note: What the columns mean.
    """

    heads: Row
    rows: Sequence[Row]
    note: str = ""
    kind: ClassVar[str] = "table"

    def to_markdown(self) -> str:
        """As Markdown."""
        note = f"\n{self.note}\n" if self.note else ""
        return format_markdown_table(self.heads, self.rows) + note


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    pairs: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "facts"

    def to_markdown(self) -> str:
        """As Markdown."""
        return "".join(f"- {name}: {value}\n" for name, value in self.pairs)


@dataclass(frozen=True)
class Sample:
    """Text that a model wrote, after what it was given."""

    name: str
    given: str
    written: str
    kind: ClassVar[str] = "sample"


@dataclass(frozen=True)
class Commands:
    """Commands that a reader may enter, each after what it is for."""

    lines: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "commands"

    def to_markdown(self) -> str:
        """As Markdown."""
        return "".join(f"- {purpose}: `{command}`\n" for purpose, command in self.lines)


@dataclass(frozen=True)
class Frame:
    """A page within the page, such as a replay.

    Attributes:
        html: The whole of it; it needs nothing but itself.
        title: What it is.
        height: Pixels.
    """

    html: str
    title: str
    height: int
    kind: ClassVar[str] = "frame"


Part = Plot | Picture | Heading | Paragraph | Table | Facts | Sample | Commands | Frame


_DRAWN = (Plot, Picture, Sample, Frame)


@dataclass(frozen=True)
class Report:
    """What an experiment found.

    Attributes:
        name: Of its files.
        title: Of its page.
        subtitle: Of its page.
        parts: The page, from top to bottom, with one picture; Markdown has the text and tables.
        tree: All figures, as JSON can hold them; None: no such file.
    """

    name: str
    title: str
    subtitle: str
    parts: Sequence[Part]
    tree: Any = None

    def write(self, folder: Path) -> dict[str, Path]:
        """Writes the page, the picture, the text and the figures.

        Args:
            folder: Where; made when absent.

        Returns:
            Their paths, by ending: html, png, md and, where there are figures, json.
        """
        endings = ("html", "png", "md", *(() if self.tree is None else ("json",)))
        paths = {ending: folder / f"{self.name}.{ending}" for ending in endings}
        write_page(
            "page.html.j2",
            paths["html"],
            title=self.title,
            subtitle=self.subtitle,
            parts=[self._draw(part) for part in self.parts],
        )
        picture = next(part for part in self.parts if isinstance(part, Picture))
        save_figure(paths["png"], picture.figure)
        texts = [part.to_markdown() for part in self.parts if not isinstance(part, _DRAWN)]
        write_text_whole(paths["md"], "\n".join([f"# {self.title}\n", *texts]))
        if self.tree is not None:
            write_json_whole(paths["json"], self.tree)
        return paths

    def _draw(self, part: Part) -> Part:
        if not isinstance(part, Picture):
            return part
        return Plot(Markup(render_svg(part.figure, self.name)), "", part.caption)


def write_page(template: str, output: Path, **content: Any) -> Path:
    """Writes a page that needs nothing but itself.

    Args:
        template: Name of a template of this package.
        output: Page to write; its folder is made when absent.
        **content: What the template names; text is escaped.

    Returns:
        The path of the page.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    pages.write_page(output, "megatron_mdm.reporting", template, **content)
    return output
