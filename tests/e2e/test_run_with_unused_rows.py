"""A model with more rows than its tokenizer has tokens, from another project's folder and back."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
import torch
import yaml
from commands import NUM_STEPS, VOCAB_SIZE, Run, run, run_all
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_mdm.reporting.metrics import read_metrics

ROWS, CONVERT = 384, "tools/convert_checkpoint.py"


@pytest.fixture(scope="module")
def qwen(recipe, tmp_path_factory):
    """A random model with the tokenizer of the shards."""
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for file in (recipe.parent / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def trained(qwen, recipe, tmp_path_factory):
    """The run that `from-ar` says to begin, and the model's part of its configuration."""
    root = tmp_path_factory.mktemp("trained")
    out = run(CONVERT, "from-ar", qwen, "--output", root / "weights", "--check").succeeded().output
    assert "logits agree" in out
    assert f"vocabulary {VOCAB_SIZE} of {ROWS} rows" in out
    _, _, following = out.splitlines()[-1].partition(" train --config RUN.yaml ")
    overrides = shlex.split(following)
    assert overrides
    tree = yaml.safe_load(recipe.read_text())
    del tree["model"]
    given = root / "given.yaml"
    given.write_text(yaml.safe_dump(tree))
    command = ("pretrain/pretrain_mdm.py", "--config", given, *overrides)
    result = run(*command, f"run.dir={root / 'run'}").succeeded()
    return Run(root / "run", given, overrides, result)


def losses(folder):
    key = "train/loss_nats_per_token"
    return [entry[key] for entry in read_metrics(folder / "metrics.jsonl") if key in entry]


def test_the_printed_command_trains_and_a_stopped_run_goes_on_exactly(trained, tmp_path):
    assert len(losses(trained.dir)) == NUM_STEPS
    assert "predicted too" not in trained.result.output
    half = trained.stopped_at_half(tmp_path / "half")
    assert "resuming from" in run(*trained.command(half)).succeeded().output
    assert losses(half) == losses(trained.dir)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    out = run(CONVERT, "to-hf", "--run", trained.dir, "--output", folder, "--check").succeeded()
    assert "logits agree" in out.output
    return folder


def test_it_generates_and_is_judged_on_shards(trained, exported, recipe):
    for model in (["--checkpoint", trained.dir], ["--model", exported]):
        words = ["--prompt", "import", "--length", 16, "--seed", 1, "--jsonl"]
        text = run("tools/generate.py", *model, *words).succeeded().output
        assert text.strip()
    found = run(
        *("tools/perplexity.py", "--model", exported, "--data", recipe.parent / "valid"),
        *("--num-windows", 4, "--seq-length", 32, "--out", exported.parent / "found.json"),
    ).succeeded()
    assert "valid" in found.output
    tree = json.loads((exported.parent / "found.json").read_text())
    (loss,) = tree["models"][str(exported)].values()
    assert 0 < loss["nats_per_token"] < 8


def test_it_learns_adapters_from_the_printed_sizes(trained, exported, recipe, tmp_path):
    lines = [{"prompt": f"{n} twice:", "response": f" {n}{n}"} for n in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(
        *("tools/prepare_finetuning.py", "--input", tmp_path / "chats.jsonl"),
        *("--tokenizer", exported, "--output-prefix", tmp_path / "chats"),
    ).succeeded()
    sizes = [word for word in trained.overrides if word.startswith("model.")]
    told = run(
        *("tools/finetune_lora.py", "--model", exported, "--config", trained.recipe),
        *("--out", tmp_path / "adapter", "--merge", tmp_path / "merged", "--rank", 4, *sizes),
        *(f"data.train=[{{path: {tmp_path / 'chats'}}}]", "data.valid=[]"),
        *("objective.stochastic_length_ratio=0", "schedule.steps=2"),
    ).succeeded()
    assert "parameters are learned" in told.output
    name = "model.embed_tokens.weight"
    before, after = (
        load_file(folder / "model.safetensors") for folder in (exported, tmp_path / "merged")
    )
    assert torch.equal(before[name], after[name])


def test_the_weights_go_back_byte_for_byte(qwen, tmp_path):
    stored = load_file(qwen / "model.safetensors")
    kinds = {"mdm": [], "ar": ["--keep-causal"]}
    weights = {kind: tmp_path / f"{kind}-weights" for kind in kinds}
    exports = {kind: tmp_path / kind for kind in kinds}
    for result in run_all(
        *([CONVERT, "from-ar", qwen, "--output", weights[kind], *kinds[kind]] for kind in kinds)
    ):
        assert re.search(r"next: \S+ train --config RUN\.yaml ", result.succeeded().output)
    tokenizer = ["--tokenizer", qwen]
    for result in run_all(
        *(
            [CONVERT, "to-hf", "--run", weights[kind], "--output", exports[kind], *tokenizer]
            for kind in kinds
        )
    ):
        result.succeeded()
    for kind in kinds:
        found = load_file(exports[kind] / "model.safetensors")
        assert found.keys() == stored.keys()
        for name, tensor in stored.items():
            kept = found[name][: len(tensor)]
            assert kept.numpy().tobytes() == tensor.numpy().tobytes(), name
