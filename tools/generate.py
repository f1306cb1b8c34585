"""Generates text with an exported model: continues a prompt, or fills the middle."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForMaskedLM, AutoTokenizer, logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.errors import ConfigError, run_entry_point


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help="folder of an exported model")
    parser.add_argument("--prompt", required=True, help="text to start with; may be empty")
    parser.add_argument("--suffix", help="text to end with; the new tokens come before it")
    parser.add_argument("--length", type=int, default=64, help="new tokens (default %(default)s)")
    parser.add_argument("--steps", type=int, help="forward passes; default one per new token")
    parser.add_argument("--order", default="confidence", help="confidence, entropy, random, ..")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the best token")
    parser.add_argument("--guidance-scale", type=float, default=0.0, help="0 is no guidance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-samples", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object per sample")
    return parser.parse_args()


def main() -> None:
    """Prints the samples.

    Raises:
        ConfigError: The model folder cannot be loaded, or an option does not fit the model.
    """
    arguments = parse_arguments()
    logging.disable_progress_bar()
    if not (arguments.model / "config.json").is_file():
        raise ConfigError(f"--model={arguments.model} has no config.json: give an exported model.")
    if arguments.num_samples < 1:
        raise ConfigError(f"--num-samples={arguments.num_samples} must be 1 or more.")
    try:
        model = AutoModelForMaskedLM.from_pretrained(arguments.model, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=True)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--model={arguments.model} cannot be loaded: {reason}") from error
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def encode(text: str) -> torch.Tensor:
        ids = tokenizer.encode(text, add_special_tokens=False)
        return torch.tensor([ids] * arguments.num_samples, dtype=torch.long, device=model.device)

    prompt_ids = encode(arguments.prompt)
    try:
        tokens = model.generate(
            prompt_ids,
            max_new_tokens=arguments.length,
            suffix_ids=None if arguments.suffix is None else encode(arguments.suffix),
            num_steps=arguments.steps,
            order=arguments.order,
            temperature=arguments.temperature,
            guidance_scale=arguments.guidance_scale,
            seed=arguments.seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for index, ids in enumerate(tokens.tolist()):
        new_ids = ids[prompt_ids.shape[1] :][: arguments.length]
        sample = {
            "sample": index,
            "text": tokenizer.decode(ids),
            "completion": tokenizer.decode(new_ids),
            "ids": ids,
        }
        print(json.dumps(sample) if arguments.json else sample["text"])


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
