"""Turns GSM8K into prompts and responses, for tools/prepare_finetuning.py and evaluate_math.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.studies.papers.gsm8k import HUB_NAME, STYLES, convert, read_hub, read_problems


def main() -> None:
    """Converts the problems."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    help_ = '.jsonl of {"question", "answer"}, or .txt of "question||<<equations>> #### answer"'
    source.add_argument("--input", type=Path, nargs="+", metavar="FILE", help=help_)
    source.add_argument("--split", help="train or test, from the hub")
    add("--hub", default=HUB_NAME, metavar="NAME", help="with --split: name there (%(default)s)")
    add("--output", type=Path, required=True, metavar="FILE", help=".jsonl to write")
    help_ = "text: without <<annotations>> (default); annotated: with them; equations: these alone"
    add("--style", choices=STYLES, default="text", help=help_)
    arguments = parser.parse_args()
    if arguments.input:
        problems = read_problems(arguments.input)
    else:
        problems = read_hub(arguments.hub, arguments.split)
    count = convert(problems, arguments.output, arguments.style)
    print(f"{arguments.output}: {count} problems")


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
