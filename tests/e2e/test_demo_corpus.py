from __future__ import annotations

import json
import re

import numpy as np
import pytest
from commands import SEQ_LENGTH, VOCAB_SIZE, run_all
from threads import TEST_THREADS

from megatron_mdm.hf.from_run import export_run
from megatron_mdm.reporting.metrics import read_metrics

NUM_DEMO_STEPS, DEMO_SEQ_LENGTH = 4, 192
DEMO_OVERRIDES = [
    "run.device=cpu",
    f"run.num_threads={TEST_THREADS}",
    f"model.vocab_size={VOCAB_SIZE}",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.ffn_hidden_size=64",
    f"data.seq_length={DEMO_SEQ_LENGTH}",
    "batch.micro_batch_size=4",
    "batch.global_batch_size=4",
    f"schedule.steps={NUM_DEMO_STEPS}",
    "schedule.warmup_steps=1",
    "validation.num_samples=4",
    "checkpoint.every_steps=2",
    "reporting.log_every_steps=1",
    "reporting.peak_tflops=0.1",
]

# Usage: RUN TOKENS.npy LOGITS.npy, three by three. The training model in a world of one.
TRAINING_LOGITS = """
import sys
from pathlib import Path
import numpy as np, torch
from megatron_mdm.checkpoint.restoring import load_weights
from megatron_mdm.checkpoint.storage import CheckpointReader, find_latest_checkpoint
from megatron_mdm.config import parse_config
from megatron_mdm.model.shards import name_shards
from megatron_mdm.model.transformer import build_model
from megatron_mdm.distributed.mesh import open_mesh
from megatron_mdm.distributed.processes import start_process_group

cpu = torch.device("cpu")
start_process_group(cpu)
for run, tokens, logits in zip(*[iter(sys.argv[1:])] * 3):
    reader = CheckpointReader(find_latest_checkpoint(Path(run) / "checkpoints"))
    config = parse_config(reader.manifest.config)
    with open_mesh(config.parallel, cpu) as mesh, torch.no_grad():
        model = build_model(config, mesh, torch.float32).eval()
        load_weights(reader, list(name_shards(model, mesh)))
        np.save(logits, model(torch.from_numpy(np.load(tokens))).numpy())
"""

# The same with exported models, where this project cannot be imported.
EXPORTED_LOGITS = """
import sys
sys.modules["megatron_mdm"] = None
import numpy as np, torch
from transformers import AutoModelForMaskedLM

for folder, tokens, logits in zip(*[iter(sys.argv[1:])] * 3):
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        np.save(logits, model(torch.from_numpy(np.load(tokens))).logits.numpy())
assert not any(name.startswith("megatron_mdm.") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def demo(sources, tmp_path_factory):
    """The demo's folder, and what its first run printed."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    command = ["tools/demo_corpus.py", "--dir", folder, "--corpus-root", sources, *DEMO_OVERRIDES]
    (result,) = run_all(command)
    return folder, result.succeeded().output, command


@pytest.fixture(scope="module")
def later(demo, whole_runs, tmp_path_factory):
    """The demo again; beside it, logits of the demo's model and of the AR run's, both ways."""
    folder, _, command = demo
    root = tmp_path_factory.mktemp("logits")
    export_run(whole_runs["ar"].dir, root / "ar_hf")
    generator = np.random.default_rng(0)
    # The demo's model gets mask tokens too, whose id comes after the vocabulary.
    shapes = {"mdm": (VOCAB_SIZE + 1, DEMO_SEQ_LENGTH), "ar": (VOCAB_SIZE, SEQ_LENGTH)}
    for name, (num_ids, length) in shapes.items():
        np.save(root / f"{name}.npy", generator.integers(0, num_ids, (3, length)))
    training, exported = [], []
    for name, run_dir, hf_dir in (
        ("mdm", folder, folder / "hf"),
        ("ar", whole_runs["ar"].dir, root / "ar_hf"),
    ):
        training += [run_dir, root / f"{name}.npy", root / f"{name}_training.npy"]
        exported += [hf_dir, root / f"{name}.npy", root / f"{name}_exported.npy"]
    kept = contents(folder)
    again, *others = run_all(
        command, ["-c", TRAINING_LOGITS, *training], ["-c", EXPORTED_LOGITS, *exported]
    )
    for result in others:
        result.succeeded()
    logits = {
        (name, way): np.load(root / f"{name}_{way}.npy")
        for name in shapes
        for way in ("training", "exported")
    }
    return again.succeeded().output, kept, logits


def contents(folder):
    """Every file but the report, which shows when it was made."""
    return {
        file.relative_to(folder): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "report.html"
    }


def test_the_demo_makes_everything_from_corpus_to_report(demo):
    folder, output, _ = demo
    for name in (
        "corpus/train.jsonl",
        "corpus/valid.jsonl",
        "tokenizer/tokenizer.json",
        "data/train.bin",
        "data/valid.idx",
        "config.yaml",
        "run_info.json",
        f"checkpoints/step_{NUM_DEMO_STEPS:08d}/manifest.json",
        "hf/model.safetensors",
        "hf/tokenizer.json",
        "report.html",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert re.search(rf"done in \d+ s: open {re.escape(str(folder))}/report\.html", output)
    steps = [
        entry["step"] for entry in read_metrics(folder / "metrics.jsonl") if "train/lr" in entry
    ]
    assert steps == list(range(1, NUM_DEMO_STEPS + 1))


def test_the_demo_fills_in_every_hole(demo):
    samples = json.loads((demo[0] / "samples.json").read_text())
    assert len(samples) >= 3
    for sample in samples:
        assert sample["kind"] == "infill"
        assert sample["prompt"]
        assert sample["suffix"]
        assert len(sample["completions"]) == 2


def test_the_demo_report_stands_alone(demo):
    html = (demo[0] / "report.html").read_text(encoding="utf-8")
    links = re.findall(r"""(?:\b(?:src|href)\s*=\s*|url\()["']?([^"'\s>)]+)""", html)
    assert links
    assert [link for link in links if not link.startswith(("#", "data:"))] == []
    assert "@import" not in html


def test_the_demo_run_again_reuses_everything_and_trains_nothing(demo, later):
    folder = demo[0]
    output, kept, _ = later
    assert f"reusing {folder}/corpus" in output
    assert f"reusing {folder}/tokenizer" in output
    for split in ("train", "valid"):
        assert re.search(rf"reusing .*{folder}/data/{split}", output)
    assert f"already finished at step {NUM_DEMO_STEPS}: nothing to do" in output
    assert f"reusing {folder}/hf" in output
    assert "ETA" not in output
    assert "saved" not in output
    now = contents(folder)
    assert now.keys() == kept.keys()
    assert [name for name in kept if now[name] != kept[name]] == []


@pytest.mark.parametrize("name", ["mdm", "ar"])
def test_an_exported_model_gives_the_logits_of_the_training_model(later, name):
    training, exported = later[2][name, "training"], later[2][name, "exported"]
    assert exported.shape == (*training.shape[:2], VOCAB_SIZE)
    np.testing.assert_allclose(exported, training[..., :VOCAB_SIZE], atol=1e-5)
    assert (training[..., VOCAB_SIZE:] == -np.inf).all()
    assert exported.std() > 0.1
