"""Generates text with an exported model: continues a prompt, or fills the middle."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.errors import run_entry_point
from megatron_mdm.files import whole_file
from megatron_mdm.hf.generation import (
    GenerationSettings,
    Request,
    TextGenerator,
    read_requests,
    report_entry,
)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line.

    Returns:
        The model, the requests, and how to generate.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="folder of an exported model")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to start with; may be empty")
    what.add_argument("--requests", type=Path, help="JSON list of {prompt, suffix, length}")
    parser.add_argument("--suffix", help="text to end with; the new tokens come before it")
    parser.add_argument("--length", type=int, default=64, help="new tokens (default %(default)s)")
    parser.add_argument("--steps", type=int, help="forward passes; default one per new token")
    parser.add_argument("--order", default="confidence", help="confidence, entropy, random, ..")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the best token")
    parser.add_argument("--guidance-scale", type=float, default=0.0, help="0 is no guidance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-samples", type=int, default=1, help="samples a request")
    parser.add_argument("--json", action="store_true", help="print one JSON object per sample")
    parser.add_argument("--output", type=Path, help="also write the samples for tools/report.py")
    return parser.parse_args()


def main() -> None:
    """Prints the samples, and writes them if asked to."""
    arguments = parse_arguments()
    settings = GenerationSettings(
        **{field.name: getattr(arguments, field.name) for field in fields(GenerationSettings)}
    )
    requests = (
        read_requests(arguments.requests)
        if arguments.requests
        else [Request(arguments.prompt, arguments.suffix)]
    )
    generator = TextGenerator(arguments.model)
    entries = []
    for request in requests:
        samples = generator.complete(request, settings)
        entries.append(report_entry(request, samples, settings))
        for index, sample in enumerate(samples):
            record = {"sample": index, **sample._asdict()}
            print(json.dumps(record) if arguments.json else sample.text)
    if arguments.output is not None:
        with whole_file(arguments.output) as file:
            file.write((json.dumps(entries, indent=2) + "\n").encode())


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
