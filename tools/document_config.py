"""Writes docs/configuration.md from the configuration's schema, or checks that it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.config.reference import format_reference
from megatron_mdm.core.errors import MdmError, run_entry_point
from megatron_mdm.core.options import run_command

PAGE = Path(__file__).resolve().parent.parent / "docs/configuration.md"


def main(*, check: bool = False) -> None:
    """Writes the page, or compares it.

    Args:
        check: Write nothing, fail if it differs.
    """
    expected = format_reference()
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == expected:
        print(f"{PAGE} is up to date")
    elif check:
        raise MdmError(f"{PAGE} differs from the schema: run tools/document_config.py.")
    else:
        PAGE.write_text(expected, encoding="utf-8")
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
