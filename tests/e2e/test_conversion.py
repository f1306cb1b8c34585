from __future__ import annotations

import json
import shlex

import pytest
import torch
from commands import NUM_STEPS, SEQ_LENGTH, VOCAB_SIZE, pretrain, run_all
from random_checkpoints import RandomSource
from safetensors.torch import load_file, save_file

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.checkpoint.storage import CheckpointReader, find_latest_checkpoint
from megatron_mdm.config import ModelConfig
from megatron_mdm.hf.card import escape_markdown
from megatron_mdm.hf.formats.translation import to_format

TOOL = "tools/convert_checkpoint.py"
KINDS = ("mdm", "ar")


@pytest.fixture(scope="module")
def converted(whole_runs, tmp_path_factory):
    """Both runs: exported, imported for 2 x 2 ranks, divided anew for one, exported again."""
    root = tmp_path_factory.mktemp("converted")
    weights = "weights/step_00000000"

    def both(*words):
        folders = {kind: root / kind for kind in KINDS}
        texts = {kind: {"run": whole_runs[kind].dir, "to": folders[kind]} for kind in KINDS}
        commands = [[str(word).format(**texts[kind]) for word in words] for kind in KINDS]
        results = run_all(*([TOOL, *command] for command in commands))
        return {kind: result.succeeded() for kind, result in zip(KINDS, results, strict=True)}

    exported = both("to-hf", "--run", "{run}", "--output", "{to}/hf", "--check")
    layout = ["--tensor-parallel", 2, "--pipeline-parallel", 2]
    imported = both("from-hf", "{to}/hf", "--output", "{to}/weights", "--check", *layout)
    both("reshape", "--checkpoint", "{to}/" + weights, "--output", "{to}/reshaped")
    inspected = both("inspect", "{to}/reshaped/step_00000000")
    tokenizer = ["--tokenizer", "{to}/hf"]
    both("to-hf", "--run", "{to}/reshaped", "--output", "{to}/again", *tokenizer)
    return root, exported, imported, inspected


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_comes_back_from_its_export_to_the_bit(converted, whole_runs, kind):
    root, exported, imported, inspected = converted
    folder = root / kind
    for results in (exported, imported):
        assert "logits agree" in results[kind].output
    assert "holds               weights alone, for run.initial_weights" in inspected[kind].output
    assert "whole: " in inspected[kind].output
    command = imported[kind].output.splitlines()[-1]
    assert command.startswith("next: ")
    given = f" train --config RUN.yaml run.initial_weights={folder}/weights/step_00000000 "
    sort = "objective.kind=ar " if kind == "ar" else ""
    assert f"{given}{sort}model.num_layers=2" in command
    first = load_file(folder / "hf" / "model.safetensors")
    again = load_file(folder / "again" / "model.safetensors")
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor.view(torch.int32), again[name].view(torch.int32)), name
    config = (folder / "hf" / "config.json").read_text()
    assert (folder / "again" / "config.json").read_text() == config
    trained = find_latest_checkpoint(whole_runs[kind].dir / "checkpoints")
    before = CheckpointReader(trained)
    after = CheckpointReader(folder / "weights" / "step_00000000")
    assert after.manifest.layout.tensor_parallel_size == 2
    assert after.manifest.layout.pipeline_parallel_size == 2
    assert before.list_names() == after.list_names()
    for name in before.list_names():
        # Rows of padding do not travel; the mask token's row does.
        num_rows = VOCAB_SIZE + (name.startswith("embedding") and kind == "mdm")
        expected, found = before.load(name), after.load(name)
        if expected.shape[0] != 384:
            num_rows = expected.shape[0]
        assert torch.equal(found[:num_rows], expected[:num_rows]), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_of_an_export_tells_what_the_run_was(converted, whole_runs, kind):
    root, *_ = converted
    card = (root / kind / "hf" / "README.md").read_text()
    run_dir = whole_runs[kind].dir
    assert f"\n# {escape_markdown(run_dir.name)}\n" in card
    assert 'from_pretrained("hf", trust' in card
    (seen,) = json.loads((run_dir / "ledger.json").read_text())["seen"]
    (row,) = [line for line in card.splitlines() if line.count("|") == 8 and "/train |" in line]
    assert f"{seen['unique_tokens']:,}" in row
    assert f"{seen['predictions_per_token']:.4f}" in row
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "valid/nll_nats_per_token" in record][-1]
    loss = f"{last['valid/nll_nats_per_token']:.4f} ± {last['valid/nll_standard_error']:.4f}"
    assert f"{loss} nats per token" in card
    assert ("an upper bound" in card) == (kind == "mdm")
    info = json.loads((run_dir / "run_info.json").read_text())
    for figure in (
        f"| optimizer steps | {NUM_STEPS} of {NUM_STEPS} |",
        f"| {NUM_STEPS * 8 * SEQ_LENGTH:,} |",
        f"{info['flops_6nd']:.3e}".replace("+", r"\+"),
        f"| torch | {info['versions']['torch']}".replace("+", r"\+"),
    ):
        assert figure in card
    metadata = json.loads((root / kind / "hf" / "training_metadata.json").read_text())
    assert (metadata["kind"], metadata["step"]) == ("training", NUM_STEPS)
    assert "does not say how they were trained" in (root / kind / "again/README.md").read_text()


def save_gidd(folder):
    """A model of random weights in the layout of the published ones."""
    model = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        vocab_size=VOCAB_SIZE + 1,
        mask_token_id=VOCAB_SIZE,
        qk_norm="width",
        attention_soft_cap=30.0,
        attention_sink=True,
        mlp="relu2",
        mlp_bias=True,
    )
    saved = SavedModel(model, "mdm", SEQ_LENGTH)
    source = RandomSource(saved)
    tensors = dict(
        pair
        for name in source.list_names()
        for pair in to_format("gidd", name, source.load(name), saved)
    )
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    config = {
        "model_type": "gidd",
        # One id that the tokenizer of these tests has no token for.
        "vocab_size": VOCAB_SIZE + 1,
        "mask_token_id": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": SEQ_LENGTH,
        "resid_scale": 2.0,
        "weight_scaling": 0.3,
        "head_scaling": 0.1,
        "attention_bias": True,
        "mlp_bias": True,
        "noise_type": 2.0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_training_goes_on_from_a_published_model_with_its_noise(recipe, tmp_path):
    save_gidd(tmp_path / "gidd")
    output = ["--output", tmp_path / "weights", "--tensor-parallel", 2, "--check"]
    (result,) = run_all([TOOL, "from-gidd", tmp_path / "gidd", *output])
    assert "logits agree" in result.succeeded().output
    (line,) = [line for line in result.output.splitlines() if line.startswith("next: ")]
    overrides = [word for word in shlex.split(line) if "=" in word]
    assert {"objective.process.kind=hybrid", "objective.process.shift=2.0"} <= set(overrides)
    fewer = ["schedule.steps=4", "schedule.warmup_steps=1", "validation.every_steps=2"]
    command = pretrain(recipe, tmp_path / "run", *overrides, *fewer, "optimizer.lr=0.01")
    run_all(command)[0].succeeded()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    held_out = [one for line in lines if (one := json.loads(line).get("valid/nll_nats_per_token"))]
    assert len(held_out) == 2
    assert held_out[1] < held_out[0]
