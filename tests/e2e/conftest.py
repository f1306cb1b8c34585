"""A small corpus of Python, its tokenizer and shards, and the uninterrupted runs on them."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import yaml
from commands import NUM_STEPS, SEQ_LENGTH, VOCAB_SIZE, Run, pretrain, run_all
from threads import TEST_THREADS

LARGEST_SOURCE_BYTES = 20_000


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Path:
    """A folder with the smaller modules of the standard library."""
    folder = tmp_path_factory.mktemp("sources")
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if 0 < file.stat().st_size < LARGEST_SOURCE_BYTES:
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def recipe(sources, tmp_path_factory) -> Path:
    """A YAML config of a tiny run; the real tools have made all that it names."""
    root = tmp_path_factory.mktemp("prepared")
    corpus, tokenizer = root / "corpus", root / "tokenizer"
    gather = ["tools/gather_stdlib.py", "--root", sources, "--output", corpus]
    train = ["tools/train_tokenizer.py", "--input", corpus / "train.jsonl", "--output", tokenizer]
    run_all([*gather, "--valid-fraction", "0.2"])[0].succeeded()
    run_all([*train, "--vocab-size", VOCAB_SIZE])[0].succeeded()
    encode = ["tools/preprocess_data.py", "--tokenizer", tokenizer]
    for result in run_all(
        *(
            [*encode, "--input", corpus / f"{split}.jsonl", "--output-prefix", root / split]
            for split in ("train", "valid")
        )
    ):
        result.succeeded()
    tree = {
        "run": {"dir": "unset", "seed": 3, "device": "cpu", "num_threads": TEST_THREADS},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "ffn_hidden_size": 64,
            "vocab_size": VOCAB_SIZE,
        },
        "objective": {"kind": "mdm", "stochastic_length_ratio": 0.2},
        "data": {
            "train": [{"path": str(root / "train")}],
            "valid": [{"path": str(root / "valid")}],
            "tokenizer": str(tokenizer),
            "seq_length": SEQ_LENGTH,
        },
        "batch": {"micro_batch_size": 2, "global_batch_size": 8},
        "optimizer": {"lr": 3e-3, "min_lr": 3e-4},
        "schedule": {"steps": NUM_STEPS, "warmup_steps": 2},
        "validation": {
            "every_steps": NUM_STEPS // 2,
            "num_samples": 10,
            "draws_per_sample": 2,
        },
        "checkpoint": {"every_steps": NUM_STEPS // 2},
        "reporting": {"peak_tflops": 0.1},
    }
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def whole_runs(recipe, tmp_path_factory) -> dict[str, Run]:
    """Two uninterrupted runs in one process each.

    mdm: masked diffusion, untied, no dropout. ar: next-token prediction with tied embeddings and
    dropout, with all reports on.
    """
    root = tmp_path_factory.mktemp("runs")
    model = ["model.tie_embeddings=true"]
    model += ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]
    overrides = {"mdm": [], "ar": ["objective.kind=ar", *model]}
    reports = ["reporting.wandb=offline", "reporting.tensorboard=true"]
    ar = [*model, *reports]
    results = run_all(
        pretrain(recipe, root / "mdm"), pretrain(recipe, root / "ar", *ar, script="pretrain_ar")
    )
    return {
        name: Run(root / name, recipe, overrides[name], result.succeeded())
        for name, result in zip(("mdm", "ar"), results, strict=True)
    }
