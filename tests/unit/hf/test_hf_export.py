from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

from megatron_mdm.errors import ConversionError
from megatron_mdm.hf.export import export_to_hf
from megatron_mdm.hf.names import Architecture


def reference_logits(weights: dict, arch: Architecture, tokens: list[int]) -> torch.Tensor:
    """Logits [S, V] of one sequence from training weights, head by head in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    half, per_group = arch.head_dim // 2, arch.num_attention_heads // arch.num_query_groups

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + arch.rms_norm_eps).sqrt() * w[name]

    def turn(x):
        out = x.clone()
        for position in range(len(tokens)):
            for j in range(half):
                angle = torch.tensor(
                    position / arch.rotary_base ** (2 * j / arch.head_dim), dtype=torch.float64
                )
                a, b = x[position, j], x[position, j + half]
                out[position, j] = a * angle.cos() - b * angle.sin()
                out[position, j + half] = b * angle.cos() + a * angle.sin()
        return out

    x = w["embedding.word_embeddings.weight"][tokens]
    for i in range(arch.num_layers):
        p = f"decoder.layers.{i}."
        h = norm(x, p + "input_layernorm.weight")
        qkv = h @ w[p + "self_attention.linear_qkv.weight"].T
        heads, column = [], 0
        for _ in range(arch.num_query_groups):
            parts = qkv[:, column : column + (per_group + 2) * arch.head_dim].split(
                arch.head_dim, dim=1
            )
            column += (per_group + 2) * arch.head_dim
            key, value = turn(parts[-2]), parts[-1]
            for query in parts[:-2]:
                scores = turn(query) @ key.T / arch.head_dim**0.5
                if arch.is_causal:
                    future = torch.ones_like(scores).triu(1).bool()
                    scores = scores.masked_fill(future, -torch.inf)
                heads.append(scores.softmax(-1) @ value)
        x = x + torch.cat(heads, dim=1) @ w[p + "self_attention.linear_proj.weight"].T
        h = norm(x, p + "pre_mlp_layernorm.weight")
        gate, up = (h @ w[p + "mlp.linear_fc1.weight"].T).split(arch.ffn_hidden_size, dim=1)
        x = x + (gate / (1 + (-gate).exp()) * up) @ w[p + "mlp.linear_fc2.weight"].T
    head = w["embedding.word_embeddings.weight" if arch.tied else "output_layer.weight"]
    return norm(x, "decoder.final_layernorm.weight") @ head[: arch.vocab_size].T


def load(folder):
    return AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()


TOKENS = [3, 19, 7, 0, 19, 18, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_query_groups": 2},
        {"num_query_groups": 1, "head_dim": 10, "rotary_base": 500.0, "rms_norm_eps": 1e-3},
        {"tied": True},
        {"is_causal": True},
        {"is_causal": True, "tied": True, "num_query_groups": 2},
    ],
    ids=str,
)
def test_logits_match_a_float64_reference(tiny, export, changes):
    arch = tiny(**changes)
    folder, source, _ = export(arch)
    logits = load(folder)(torch.tensor([TOKENS])).logits[0]
    expected = reference_logits(source.tensors, arch, TOKENS)
    assert logits.shape == (len(TOKENS), arch.vocab_size)
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)


def test_mask_inside_the_vocabulary_cannot_be_predicted(tiny, export):
    arch = tiny(mask_token_id=4)
    folder, source, _ = export(arch)
    tokens = [3, 4, 7]
    logits = load(folder)(torch.tensor([tokens])).logits[0]
    expected = reference_logits(source.tensors, arch, tokens)
    expected[:, 4] = -torch.inf
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_attended_to(tiny, export, is_causal, side):
    model = load(export(tiny(is_causal=is_causal))[0])
    alone = model(torch.tensor([TOKENS])).logits[0]
    padding = [11, 12, 13]
    row = padding + TOKENS if side == "left" else TOKENS + padding
    mask = [0] * 3 + [1] * 7 if side == "left" else [1] * 7 + [0] * 3
    tokens = torch.tensor([row, [5] * 10])
    logits = model(tokens, attention_mask=torch.tensor([mask, [1] * 10])).logits
    assert logits.isfinite().all()
    kept = logits[0, 3:] if side == "left" else logits[0, :7]
    torch.testing.assert_close(kept, alone, atol=1e-5, rtol=1e-5)


def test_loss_is_the_mean_over_the_labels_that_count(tiny, export):
    model = load(export(tiny())[0])
    labels = torch.full((1, len(TOKENS)), -100)
    labels[0, 1], labels[0, 4] = 5, 6
    output = model(torch.tensor([TOKENS]), labels=labels)
    log_probs = output.logits[0].log_softmax(-1)
    expected = -(log_probs[1, 5] + log_probs[4, 6]) / 2
    torch.testing.assert_close(output.loss, expected)


def test_loads_in_a_process_that_cannot_import_the_package(tiny, export, tmp_path):
    arch = tiny(num_query_groups=2)
    _, source, _ = export(arch)
    script = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "megatron_mdm":
            raise AssertionError("the export imported " + name)
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
model = AutoModelForMaskedLM.from_pretrained("export", trust_remote_code=True)
torch.save(model(torch.tensor([{TOKENS}])).logits, "logits.pt")
print(AutoTokenizer.from_pretrained("export", trust_remote_code=True).decode([3, 7]))
print(model.generate(torch.tensor([[3]]), max_new_tokens=4).shape)
"""
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", script],
        cwd=tmp_path,
        env=os.environ | cache,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["w3 w7", "torch.Size([1, 5])"]
    logits = torch.load(tmp_path / "logits.pt")[0].double()
    expected = reference_logits(source.tensors, arch, TOKENS)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_config_file_holds_every_field_and_auto_classes_find_the_model(tiny, export):
    folder, _, _ = export(tiny(rotary_base=123.0), dtype=torch.bfloat16)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    written = json.loads((folder / "config.json").read_text())
    for field in set(inspect.signature(type(config)).parameters) - {"kwargs"}:
        assert getattr(config, field) == written[field], field
    assert config.rope_theta == 123.0
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "MdmForMaskedLM"
    assert model.dtype == torch.bfloat16
    assert (
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True).eos_token_id
        == config.eos_token_id
        == 0
    )


def test_saved_again_by_transformers_it_stays_the_same_model(tiny, export, tmp_path):
    model = load(export(tiny(tied=True))[0])
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    tokens = torch.tensor([TOKENS])
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_shards_hold_the_same_weights_as_one_file(tiny, export):
    whole, _, one = export(tiny(), "whole")
    parts, _, many = export(tiny(), "parts", max_shard_bytes=10_000)
    assert one.num_shards == 1
    assert many.num_shards > 2
    assert one.num_parameters == many.num_parameters
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * one.num_parameters
    weights = load_file(whole / "model.safetensors")
    assert set(index["weight_map"]) == set(weights)
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(parts / file)[name], weights[name])
    tokens = torch.tensor([TOKENS])
    assert torch.equal(load(parts)(tokens).logits, load(whole)(tokens).logits)


def test_identical_export_is_reused_and_a_different_one_needs_overwrite(tiny, export):
    folder, _, first = export(tiny())
    assert not first.reused
    assert export(tiny())[2].reused
    with pytest.raises(ConversionError, match="--overwrite"):
        export(tiny(), seed=1)
    assert export(tiny())[2].reused
    assert not export(tiny(), seed=1, overwrite=True)[2].reused
    assert export(tiny(), seed=1)[2].reused
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_overwrite_spares_a_folder_that_is_no_model(tiny, export, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConversionError, match="no model folder"):
        export(tiny(), overwrite=True)
    assert (tmp_path / "export" / "thesis.txt").exists()


def test_failed_export_leaves_nothing(tiny, random_source, tmp_path):
    source = random_source(tiny())
    source.tensors["decoder.final_layernorm.weight"] = torch.zeros(3)
    options = {"tokenizer_dir": None, "eos_token_id": None, "metadata": {}}
    with pytest.raises(ConversionError, match="final_layernorm"):
        export_to_hf(source, tiny(), tmp_path / "export", **options)
    del source.tensors["decoder.final_layernorm.weight"]
    with pytest.raises(ConversionError, match="lacks"):
        export_to_hf(source, tiny(), tmp_path / "export", **options)
    source = random_source(tiny())
    with pytest.raises(ConversionError, match="extra parameter output_layer"):
        export_to_hf(source, tiny(tied=True), tmp_path / "export", **options)
    with pytest.raises(ConversionError, match=r"tokenizer\.json"):
        export_to_hf(source, tiny(), tmp_path / "export", **options | {"tokenizer_dir": tmp_path})
    assert not list(tmp_path.iterdir())
