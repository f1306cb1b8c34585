"""Turns conversations into token shards for fine-tuning (.bin, .idx, .prompts, .json)."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.files import read_path
from megatron_mdm.core.options import run_command
from megatron_mdm.corpus.finetuning import FinetuningOptions, prepare_finetuning
from megatron_mdm.data.shards import read_output_prefix

DEFAULTS = FinetuningOptions()


def main(
    *,
    input: list[Path],
    tokenizer: str,
    output_prefix: str,
    options: FinetuningOptions = DEFAULTS,
) -> None:
    """Prepares the inputs.

    Args:
        input: .jsonl files of {"prompt", "response"} or {"messages": [{"role", "content"}]}.
        tokenizer: A folder, a tokenizer.json or a Hugging Face name.
        output_prefix: The shards' path without .bin and .idx.
        options: How.
    """
    prefix = read_output_prefix(output_prefix)
    made = prepare_finetuning(list(map(read_path, input)), tokenizer, prefix, options)
    for prefix, manifest, num_prompt_tokens in made:
        bad = manifest.num_bad_records
        print(
            f"{prefix}: {manifest.num_documents} prompt-response pairs, {num_prompt_tokens} tokens "
            f"of prompts and {manifest.num_tokens - num_prompt_tokens} that are learned"
            + (f" ({bad} bad records skipped)" if bad else "")
        )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
