"""The whole job on this machine: corpus, tokenizer, shards, training, export, infilling, report."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.config import load_config
from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.studies.papers.steps import run_step

REPO = Path(__file__).resolve().parent.parent


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


def step(*command: str | Path) -> None:
    """Runs one of the project's own commands."""
    run_step(REPO, *command)


def main() -> None:
    """Runs the steps; each reuses what it finds done and says so."""
    arguments = parse_arguments()
    started = time.monotonic()
    root = arguments.dir
    tokenizer, model, samples = root / "tokenizer", root / "hf", root / "samples.json"
    overrides = [f"run.dir={root}", f"data.tokenizer={tokenizer}"]
    overrides += [f"data.{split}=[{{path: {root}/data/{split}}}]" for split in ("train", "valid")]
    overrides += arguments.overrides
    vocab_size = load_config(arguments.config, overrides).model.vocab_size
    source = ["--root", arguments.corpus_root] if arguments.corpus_root else []
    step("tools/gather_stdlib.py", "--output", root / "corpus", *source)
    text = root / "corpus/train.jsonl"
    train_tokenizer = ["--input", text, "--vocab-size", str(vocab_size), "--output", tokenizer]
    step("tools/train_tokenizer.py", *train_tokenizer)
    for split in ("train", "valid"):
        text, shards = root / f"corpus/{split}.jsonl", root / f"data/{split}"
        options = ["--tokenizer", tokenizer, "--output-prefix", shards, "--workers", "2"]
        step("tools/preprocess_data.py", "--input", text, *options)
    step("pretrain/pretrain_mdm.py", "--config", arguments.config, *overrides)
    step("tools/convert_checkpoint.py", "to-hf", "--run", root, "--output", model)
    infill = ["--prompts", REPO / "configs/demo_infill.json", "--output", samples]
    sampling = ["--num-samples", "2", "--temperature", "0.5", "--html", root / "replay.html"]
    step("tools/generate.py", "--model", model, *infill, *sampling)
    step("tools/report.py", "--run", root, "--samples", samples)
    print(f"\ndone in {time.monotonic() - started:.0f} s: open {root}/report.html and replay.html")


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
