"""HTML pages from templates, each of which needs nothing but itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from megatron_mdm.core.files import write_text_whole
from megatron_mdm.core.tables import find_word_columns


def write_page(path: Path, package: str, template: str, **content: Any) -> None:
    """Writes a page, whole or not at all.

    Args:
        path: The file to create or replace. Its folder has to exist.
        package: The package that the template lies in.
        template: Its name; it may include `theme.css.j2`, the colours and fonts of all pages.
        **content: What the template names; text is escaped.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("megatron_mdm.core", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The filter `tojson` escapes what could end the script that holds the data.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.globals["find_word_columns"] = find_word_columns
    write_text_whole(path, environment.get_template(template).render(**content))
