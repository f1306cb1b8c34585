from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_mdm.checkpoint.discovery import verify_checkpoint
from megatron_mdm.checkpoint.manifest import read_saved_model
from megatron_mdm.checkpoint.storage import CheckpointReader
from megatron_mdm.config.loading import parse_yaml
from megatron_mdm.config.presets import expand_preset
from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.hf.formats.foreign import open_foreign
from megatron_mdm.hf.from_run import export_run

REPOSITORY = Path(__file__).resolve().parents[3]
TOOL = REPOSITORY / "tools" / "convert_checkpoint.py"


@pytest.fixture
def convert(monkeypatch, capsys):
    """Runs the tool in this process; gives its status, output and errors."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *(str(word) for word in words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def refused(convert):
    """Runs the tool, which has to end with a sentence for each thing that is wrong."""

    def run(*words):
        status, _, errors = convert(*words)
        assert status == 2, errors
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert errors.strip().endswith("\n".join(lines))
        for line in lines:
            assert line.endswith(".")
            assert not re.search(r"\. [A-Z]", line)
        return "\n".join(lines)

    return run


def all_bits(folder):
    return {
        name: (tensor.dtype, tensor.reshape(-1).view(torch.uint8).tolist())
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("kind", ["mdm", "ar"])
@pytest.mark.parametrize("layout", [(1, 1), (2, 2)])
def test_a_checkpoint_that_went_to_hf_and_back_is_the_same_to_the_bit(
    tmp_path, weights_checkpoint, convert, kind, layout
):
    path = weights_checkpoint(tmp_path / "before", kind=kind)
    export_run(path, tmp_path / "hf")
    tensor, pipeline = layout
    words = ["--tensor-parallel", tensor, "--pipeline-parallel", pipeline]
    status, _, errors = convert("from-hf", tmp_path / "hf", "--output", tmp_path / "after", *words)
    assert status == 0, errors
    after = tmp_path / "after" / "step_00000000"
    manifest = verify_checkpoint(after)
    assert (manifest.layout.tensor_parallel_size, manifest.layout.pipeline_parallel_size) == layout
    left = CheckpointReader(path)
    right = CheckpointReader(after)
    was, found = read_saved_model(left.manifest), read_saved_model(right.manifest)
    assert (found.kind, found.seq_length) == (kind, 32)
    # The fixture pads to a multiple of 4, imports to one of 128.
    assert (was.model.embedding_rows, found.model.embedding_rows) == (20, 128)
    assert left.list_names() == right.list_names()
    for name in left.list_names():
        before, again = left.load(name), right.load(name)
        num_rows = before.shape[0]
        if "embedding" in name or "output_layer" in name:
            # Padding does not travel: the mask token's row does, and for AR nothing after V.
            num_rows = 20 if "embedding" in name else 19
            assert not again[num_rows:].any()
        bits, expected = (t[:num_rows].view(torch.int32) for t in (again, before))
        assert torch.equal(bits, expected), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_export_that_went_to_a_checkpoint_and_back_is_the_same_to_the_bit(
    tmp_path, weights_checkpoint, convert, tokenizer_dir, dtype
):
    source, first, again = weights_checkpoint(tmp_path / "run"), tmp_path / "a", tmp_path / "b"
    tokenizer = ["--tokenizer", tokenizer_dir]
    words = ["to-hf", "--run", source, "--output", first, "--dtype", dtype, *tokenizer]
    assert convert(*words)[0] == 0
    assert convert("from-hf", first, "--output", tmp_path / "w", "--tensor-parallel", 2)[0] == 0
    words = ["to-hf", "--run", tmp_path / "w", "--output", again, "--dtype", dtype, *tokenizer]
    assert convert(*words)[0] == 0
    assert all_bits(again) == all_bits(first)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, again)]
    assert configs[0] == configs[1]
    # Straight from one export to another, in the dtype that it has.
    status, out, _ = convert("from-hf", first, "--output", tmp_path / "c", "--to", "hf")
    assert status == 0
    assert all_bits(tmp_path / "c") == all_bits(first)
    assert json.loads((tmp_path / "c" / "config.json").read_text()) == configs[0]
    assert (tmp_path / "c" / "tokenizer.json").exists()
    assert f"mdm generate --model {tmp_path / 'c'} --prompt TEXT" in out
    assert "reusing" in convert("from-hf", first, "--output", tmp_path / "c", "--to", "hf")[1]


def test_the_next_command_names_every_size_of_the_model(tmp_path, weights_checkpoint, convert):
    for kind in ("mdm", "ar"):
        export_run(weights_checkpoint(tmp_path / kind, kind=kind), tmp_path / f"{kind}_hf")
        output = tmp_path / f"{kind}_weights"
        out = convert("from-hf", tmp_path / f"{kind}_hf", "--output", output)[1]
        *_, following = out.splitlines()[-1].partition("mdm train --config RUN.yaml ")
        overrides = dict(word.split("=") for word in shlex.split(following))
        path = overrides.pop("run.initial_weights")
        assert overrides.pop("objective.kind", "mdm") == kind
        reader = CheckpointReader(Path(path))
        expected = read_saved_model(reader.manifest).model
        fields = {
            name.removeprefix("model."): parse_yaml(value, name)
            for name, value in overrides.items()
        }
        assert ModelConfig.model_validate(fields) == expected


def test_an_smdm_model_goes_in_by_its_names(tmp_path, convert, random_smdm):
    file, preset = random_smdm(tmp_path / "model.safetensors")
    status, out, errors = convert("from-smdm", file, "--output", tmp_path / "w", "--preset", preset)
    assert status == 0, errors
    assert "a masked-diffusion model of 6 layers and width 256, vocabulary 32000" in out
    weights = load_file(file)
    reader = CheckpointReader(tmp_path / "w" / "step_00000000")
    assert reader.manifest.kind == "weights"
    for ours, theirs in (
        ("decoder.layers.3.self_attention.linear_qkv.weight", "transformer.h.3.attn.attn"),
        ("decoder.layers.5.mlp.linear_fc2.weight", "transformer.h.5.mlp.swiglu.w3"),
    ):
        assert torch.equal(reader.load(ours), weights[f"{theirs}.weight"])


@pytest.fixture
def random_smdm():
    """Writes a random model with the names and sizes of smdm-6M."""

    def write(path):
        sizes = expand_preset("smdm-6M")
        width, ffn = sizes["hidden_size"], sizes["ffn_hidden_size"]
        shapes = {"transformer.wte": (32001, width), "lm_head": (32000, width)}
        shapes |= {"transformer.ln_f": (width,)}
        for i in range(sizes["num_layers"]):
            shapes |= {
                f"transformer.h.{i}.{name}": shape
                for name, shape in {
                    "norm_1": (width,),
                    "attn.attn": (3 * width, width),
                    "attn.proj": (width, width),
                    "norm_2": (width,),
                    "mlp.swiglu.w1": (ffn, width),
                    "mlp.swiglu.w2": (ffn, width),
                    "mlp.swiglu.w3": (width, ffn),
                }.items()
            }
        generator = torch.Generator().manual_seed(0)
        tensors = {
            f"{name}.weight": torch.randn(shape, generator=generator) / 16
            for name, shape in shapes.items()
        }
        save_file(tensors, path)
        return path, "smdm-6M"

    return write


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random Llama model, saved by transformers."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("keep_causal", [False, True])
def test_a_llama_model_is_known_by_its_config_and_stays_causal_when_asked(
    tmp_path, convert, llama, keep_causal
):
    words = ["--keep-causal"] if keep_causal else []
    status, out, errors = convert("from-ar", llama, "--output", tmp_path / "w", "--check", *words)
    assert status == 0, errors
    assert "logits agree" in out
    reader = CheckpointReader(tmp_path / "w" / "step_00000000")
    assert read_saved_model(reader.manifest).kind == ("ar" if keep_causal else "mdm")
    weights = load_file(llama / "model.safetensors")
    found = reader.load("decoder.layers.1.mlp.linear_fc2.weight")
    assert torch.equal(found, weights["model.layers.1.mlp.down_proj.weight"])


def test_what_cannot_be_converted_is_refused_in_one_sentence_and_leaves_nothing(
    tmp_path, refused, llama, weights_checkpoint
):
    export = export_run(weights_checkpoint(tmp_path / "weights"), tmp_path / "hf").path
    output = tmp_path / "out"
    before = sorted(tmp_path.iterdir())
    to = ["--output", output]
    assert "--dtype=bf16 is for --to hf" in refused("from-hf", export, *to, "--dtype", "bf16")
    words = ["--to", "hf", "--tensor-parallel", 2]
    assert "are for --to checkpoint" in refused("from-hf", export, *to, *words)
    assert "model_type='megatron_mdm'" in refused("from-ar", export, *to)
    assert "config.json is missing" in refused("from-ar", tmp_path / "weights", *to)
    assert "tensor_model_parallel_size=3" in refused("from-hf", export, *to, "--tensor-parallel", 3)
    assert "model_type" in refused("from-hf", llama, *to)
    assert sorted(tmp_path.iterdir()) == before


DAMAGE = {
    "truncated": lambda tensors: None,
    "lacks": lambda tensors: tensors.pop("model.norm.weight"),
    "extra": lambda tensors: tensors.update({"model.surprise": torch.zeros(1)}),
    "shape": lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("to", ["checkpoint", "hf"])
def test_a_damaged_input_is_named_and_leaves_nothing(
    tmp_path, refused, weights_checkpoint, damage, to
):
    export = export_run(weights_checkpoint(tmp_path / "weights"), tmp_path / "hf").path
    file = export / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        tensors = load_file(file)
        DAMAGE[damage](tensors)
        save_file(tensors, file)
    before = sorted(tmp_path.iterdir())
    line = refused("from-hf", export, "--output", tmp_path / "out", "--to", to)
    named = {"truncated": str(file), "extra": "model.surprise"}.get(damage, "model.norm.weight")
    assert named in line
    assert sorted(tmp_path.iterdir()) == before


def test_a_check_that_fails_ends_with_status_2_and_says_that_the_output_stays(
    tmp_path, refused, convert, weights_checkpoint
):
    export = export_run(weights_checkpoint(tmp_path / "weights"), tmp_path / "hf").path
    output = tmp_path / "again"
    assert (
        "logits agree" in convert("from-hf", export, "--output", output, "--to", "hf", "--check")[1]
    )
    # Weights whose logits are no numbers agree with nothing.
    file = export / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    words = ["--to", "hf", "--check", "--overwrite"]
    line = refused("from-hf", export, "--output", output, *words)
    assert f"{output} was written but --check refuses it" in line
    assert open_foreign("hf", output).saved.model.vocab_size == 19
