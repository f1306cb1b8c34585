"""Commands that prepare conversations and problems."""

from __future__ import annotations

from pathlib import Path

from megatron_mdm.core.files import read_path
from megatron_mdm.corpus.finetuning import FinetuningOptions, prepare_finetuning
from megatron_mdm.data.shards import read_output_prefix
from megatron_mdm.studies.papers.gsm8k import HUB_NAME, Style, convert, read_source

_DEFAULTS = FinetuningOptions()


def prepare_pairs(
    *,
    input: list[Path],
    tokenizer: str,
    output_prefix: str,
    options: FinetuningOptions = _DEFAULTS,
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


def prepare_gsm8k(
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
