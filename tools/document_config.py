"""Writes docs/configuration.md from the configuration's schema, or checks that it is up to date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.config.reference import format_reference
from megatron_mdm.core.errors import MdmError, run_entry_point

PAGE = Path(__file__).resolve().parent.parent / "docs/configuration.md"


def main() -> None:
    """Writes the page, or compares it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if it differs")
    check = parser.parse_args().check
    expected = format_reference()
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == expected:
        print(f"{PAGE} is up to date")
    elif check:
        raise MdmError(f"{PAGE} differs from the schema: run tools/document_config.py.")
    else:
        PAGE.write_text(expected, encoding="utf-8")
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
