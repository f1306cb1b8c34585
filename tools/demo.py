"""The whole job on this machine: corpus, tokenizer, shards, training, export, infilling, report."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from megatron_mdm.config import load_config
from megatron_mdm.errors import MdmError, run_entry_point

# Functions with a hole: what stands before it, what stands after it, tokens to fill in.
HOLES = [
    ("def is_empty(self):\n", "\n    return self._items\n", 16),
    (
        "def read_lines(path):\n    with open(path",
        ") as f:\n        for line in f:\n            yield line\n",
        12,
    ),
    (
        "class Counter:\n    def __init__(self):\n        self.count = 0\n\n    def ",
        "\n        self.count += 1\n        return self.count\n",
        12,
    ),
]


def parse_arguments() -> argparse.Namespace:
    """Reads the command line.

    Returns:
        Paths and overrides.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=REPO / "configs/demo.yaml")
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="where all goes")
    parser.add_argument("--corpus-root", help="Python sources; default: the standard library")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def step(*command: str | Path, quiet: bool = False) -> str:
    """Runs one of the project's own commands and shows it.

    Args:
        *command: Script, relative to the repository, and its arguments.
        quiet: Return the output instead of showing it.

    Returns:
        Standard output if `quiet`, otherwise an empty string.

    Raises:
        MdmError: The command failed; it has said why.
    """
    words = [str(word) for word in command]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    result = subprocess.run(
        [sys.executable, str(REPO / words[0]), *words[1:]],
        stdout=subprocess.PIPE if quiet else None,
        text=True,
        check=False,
    )
    if result.returncode:
        raise MdmError(f"{words[0]} ended with status {result.returncode}: see above.")
    return result.stdout or ""


def fill_holes(model: Path, output: Path) -> None:
    """Fills in the middle of functions and keeps the results for the report.

    Args:
        model: Exported model.
        output: JSON file to write.
    """
    samples = []
    for prefix, suffix, length in HOLES:
        options = ["--length", str(length), "--num-samples", "2", "--temperature", "0.5"]
        printed = step(
            "tools/generate.py", "--model", model, "--prompt", prefix, "--suffix", suffix,
            *options, "--json", quiet=True,
        )  # fmt: skip
        completions = [json.loads(line)["completion"] for line in printed.splitlines()]
        for completion in completions:
            print(f"{prefix}\033[1m{completion}\033[0m{suffix}---")
        settings = {"length_tokens": length, "temperature": 0.5, "order": "confidence"}
        samples.append(
            {"kind": "infill", "prompt": prefix, "suffix": suffix,
             "completions": completions, "settings": settings}
        )  # fmt: skip
    output.write_text(json.dumps(samples, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Runs the steps; each reuses what it finds done and says so."""
    arguments = parse_arguments()
    started = time.monotonic()
    root = arguments.dir
    overrides = [
        f"run.dir={root}",
        f"data.train=[{{path: {root}/data/train}}]",
        f"data.valid=[{{path: {root}/data/valid}}]",
        f"data.tokenizer={root}/tokenizer",
        *arguments.overrides,
    ]
    vocab_size = load_config(arguments.config, overrides).model.vocab_size
    source = ["--root", arguments.corpus_root] if arguments.corpus_root else []
    step("tools/gather_stdlib.py", "--output", root / "corpus", *source)
    step(
        "tools/train_tokenizer.py", "--input", root / "corpus/train.jsonl",
        "--vocab-size", str(vocab_size), "--output", root / "tokenizer",
    )  # fmt: skip
    for split in ("train", "valid"):
        step(
            "tools/preprocess_data.py", "--input", root / f"corpus/{split}.jsonl",
            "--tokenizer", root / "tokenizer", "--output-prefix", root / f"data/{split}",
            "--workers", "2",
        )  # fmt: skip
    step("pretrain/pretrain_mdm.py", "--config", arguments.config, *overrides)
    step("tools/convert_checkpoint.py", "to-hf", "--run", root, "--output", root / "hf")
    fill_holes(root / "hf", root / "samples.json")
    step("tools/report.py", "--run", root, "--samples", root / "samples.json")
    print(f"\ndone in {time.monotonic() - started:.0f} s: open {root}/report.html")


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
