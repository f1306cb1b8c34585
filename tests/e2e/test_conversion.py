from __future__ import annotations

import json

import pytest
import torch
from commands import NUM_STEPS, SEQ_LENGTH, VOCAB_SIZE, run_all
from safetensors.torch import load_file

from megatron_mdm.checkpoint.storage import CheckpointReader, find_latest_checkpoint
from megatron_mdm.hf.card import escape_markdown

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
