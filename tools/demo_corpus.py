"""The whole job on this machine: corpus, tokenizer, shards, training, export, infilling, report."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.config import load_config
from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import run_command
from megatron_mdm.reporting.run_folder import open_run
from megatron_mdm.studies.steps import REPO, run_step


def main(
    *overrides: str,
    config: Path = REPO / "configs/demo_corpus.yaml",
    dir: Path = Path("runs/demo-corpus"),
    corpus_root: str | None = None,
) -> None:
    """Runs the steps; each reuses what it finds done and says so.

    Args:
        overrides: section.key=value of the configuration.
        config: YAML file of the run.
        dir: Where all goes.
        corpus_root: Python sources; without them, the standard library.
    """
    started = time.monotonic()
    tokenizer, model, samples = dir / "tokenizer", dir / "hf", dir / "samples.json"
    places = [f"run.dir={dir}", f"data.tokenizer={tokenizer}"]
    places += [f"data.{split}=[{{path: {dir}/data/{split}}}]" for split in ("train", "valid")]
    vocab_size = load_config(config, [*places, *overrides]).model.vocab_size
    source = ["--root", corpus_root] if corpus_root else []
    run_step("gather-stdlib", "--output", dir / "corpus", *source)
    text = dir / "corpus/train.jsonl"
    trained = ("--vocab-size", vocab_size, "--output", tokenizer)
    run_step("tokenizer", "train", "--input", text, *trained)
    for split in ("train", "valid"):
        text, shards = dir / f"corpus/{split}.jsonl", dir / f"data/{split}"
        options = ("--tokenizer", tokenizer, "--output-prefix", shards, "--workers", 2)
        run_step("prepare", "--input", text, *options)
    run_step("train", "--config", config, *places, *overrides)
    run_step("convert", "to-hf", "--run", dir, "--output", model)
    infill = ("--prompts", REPO / "configs/demo_corpus_infill.json", "--output", samples)
    sampling = ("--num-samples", 2, "--temperature", "0.5", "--html", dir / "replay.html")
    run_step("generate", "--model", model, *infill, *sampling)
    run_step("report", "--run", dir, "--samples", samples)
    print(f"\n{describe_loss(dir)}")
    print(f"\ndone in {time.monotonic() - started:.0f} s: open {dir}/report.html and replay.html")


def describe_loss(folder: Path) -> str:
    """What the run's held-out loss means, beside what counting tokens gives."""
    run = open_run(folder)
    loss, counted = run.last_validation["valid/nll_nats_per_token"], run.baselines
    if counted is None:
        return f"held-out loss: {loss:.3f} nats per token"
    single, pairs = counted.nll.unigram, counted.nll.bigram
    meaning = (
        "it has not learned more than how frequent each token is: text from it repeats itself"
        if loss >= single
        else "it knows which tokens stand together, and little more: text from it reads like code "
        "and does nothing"
        if loss >= pairs
        else "it knows more than which token follows which"
    )
    return (
        f"held-out loss: {loss:.3f} nats per token; counting single tokens gives {single:.3f}, "
        f"pairs {pairs:.3f}: {meaning}."
    )


if __name__ == "__main__":
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
