"""Turns conversations into token shards for fine-tuning (.bin, .idx, .prompts, .json)."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.files import read_path
from megatron_mdm.corpus.finetuning import FinetuningOptions, prepare_finetuning
from megatron_mdm.data.shards import read_output_prefix


def main() -> None:
    """Prepares the inputs."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    help_ = '.jsonl files of {"prompt", "response"} or {"messages": [{"role", "content"}]}'
    add("--input", type=read_path, nargs="+", required=True, help=help_)
    add("--tokenizer", required=True, help="a folder, a tokenizer.json or a Hugging Face name")
    add(
        "--output-prefix",
        type=read_output_prefix,
        required=True,
        help="the shards' path without .bin and .idx",
    )
    add("--prompt-key", default="prompt", help="JSON key of the prompt (prompt)")
    add("--response-key", default="response", help="JSON key of the response (response)")
    add(
        "--turns",
        choices=["each", "last"],
        default="each",
        help="answers of a conversation that are learned, given all before them (each)",
    )
    add("--chat-template", type=Path, help="Jinja file for messages (default: the tokenizer's own)")
    add("--eod-token", help="ends a response (default: the tokenizer's own)")
    add("--valid-fraction", type=float, help="hold out this share, by a hash, as PREFIX-valid")
    add("--on-error", choices=["stop", "skip"], default="stop", help="what a bad record does")
    add("--overwrite", action="store_true", help="replace shards that something else made")
    arguments = parser.parse_args()
    names = {field.name for field in dataclasses.fields(FinetuningOptions)}
    options = FinetuningOptions(
        **{name: value for name, value in vars(arguments).items() if name in names}
    )
    made = prepare_finetuning(
        arguments.input, arguments.tokenizer, arguments.output_prefix, options
    )
    for prefix, manifest, num_prompt_tokens in made:
        bad = manifest.num_bad_records
        print(
            f"{prefix}: {manifest.num_documents} exchanges, {num_prompt_tokens} tokens of prompts "
            f"and {manifest.num_tokens - num_prompt_tokens} that are learned"
            + (f" ({bad} bad records skipped)" if bad else "")
        )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    sys.exit(run_entry_point(main))
