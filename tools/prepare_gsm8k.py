"""Turns GSM8K into prompts and responses, for tools/prepare_finetuning.py and evaluate_math.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import run_command
from megatron_mdm.studies.papers.gsm8k import HUB_NAME, Style, convert, read_source


def main(
    *,
    input: tuple[Path, ...] = (),
    split: str | None = None,
    hub: str = HUB_NAME,
    output: Path,
    style: Style = "text",
) -> None:
    """Converts the problems.

    Args:
        input: .jsonl of {"question", "answer"}, or .txt of "question||<<equations>> #### answer".
        split: Instead of files: train or test, from the hub.
        hub: Its name on the hub.
        output: File of JSON lines to write.
        style: text: without <<annotations>>; annotated: with them; equations: these alone.
    """
    count = convert(read_source(input, hub, split), output, style)
    print(f"{output}: {count} problems")


if __name__ == "__main__":
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
