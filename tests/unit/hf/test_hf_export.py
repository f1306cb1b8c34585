from __future__ import annotations

import ast
import inspect
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.core.errors import ConversionError
from megatron_mdm.hf.export import CODE_FILES, export_to_hf


def reference_logits(weights: dict, saved: SavedModel, tokens: list[int]) -> torch.Tensor:
    """Logits [S, V] of one sequence from training weights, head by head in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    model = saved.model
    half, per_group = (
        model.head_width // 2,
        model.num_attention_heads // model.query_groups,
    )

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + model.norm_epsilon).sqrt() * w[name]

    def turn(x):
        out = x.clone()
        for position in range(len(tokens)):
            for j in range(half):
                angle = torch.tensor(
                    position / model.rotary_base ** (2 * j / model.head_width),
                    dtype=torch.float64,
                )
                a, b = x[position, j], x[position, j + half]
                out[position, j] = a * angle.cos() - b * angle.sin()
                out[position, j + half] = b * angle.cos() + a * angle.sin()
        return out

    x = w["embedding.word_embeddings.weight"][tokens]
    for i in range(model.num_layers):
        p = f"decoder.layers.{i}."
        h = norm(x, p + "input_layernorm.weight")
        qkv = h @ w[p + "self_attention.linear_qkv.weight"].T
        heads, column = [], 0
        for _ in range(model.query_groups):
            parts = qkv[:, column : column + (per_group + 2) * model.head_width].split(
                model.head_width, dim=1
            )
            column += (per_group + 2) * model.head_width
            key, value = turn(parts[-2]), parts[-1]
            for query in parts[:-2]:
                scores = turn(query) @ key.T / model.head_width**0.5
                if saved.is_causal:
                    future = torch.ones_like(scores).triu(1).bool()
                    scores = scores.masked_fill(future, -torch.inf)
                heads.append(scores.softmax(-1) @ value)
        x = x + torch.cat(heads, dim=1) @ w[p + "self_attention.linear_proj.weight"].T
        h = norm(x, p + "pre_mlp_layernorm.weight")
        gate, up = (h @ w[p + "mlp.linear_fc1.weight"].T).split(model.ffn_hidden_size, dim=1)
        x = x + (gate / (1 + (-gate).exp()) * up) @ w[p + "mlp.linear_fc2.weight"].T
    head = w["embedding.word_embeddings.weight" if model.tie_embeddings else "output_layer.weight"]
    return norm(x, "decoder.final_layernorm.weight") @ head[: model.vocab_size].T


def load(folder):
    return AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()


TOKENS = [3, 19, 7, 0, 19, 18, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_query_groups": 2},
        {"num_query_groups": 1, "head_dim": 10, "rotary_base": 500.0, "norm_epsilon": 1e-3},
        {"tie_embeddings": True},
        {"is_causal": True},
        {"is_causal": True, "tie_embeddings": True, "num_query_groups": 2},
    ],
    ids=str,
)
def test_logits_match_a_float64_reference(tiny, export, changes):
    saved = tiny(**changes)
    folder, source, _ = export(saved)
    logits = load(folder)(torch.tensor([TOKENS])).logits[0]
    expected = reference_logits(source.tensors, saved, TOKENS)
    assert logits.shape == (len(TOKENS), saved.model.vocab_size)
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)


def test_mask_inside_the_vocabulary_cannot_be_predicted(tiny, export):
    saved = tiny(mask_token_id=4)
    folder, source, _ = export(saved)
    tokens = [3, 4, 7]
    logits = load(folder)(torch.tensor([tokens])).logits[0]
    expected = reference_logits(source.tensors, saved, tokens)
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
    saved = tiny(num_query_groups=2)
    _, source, _ = export(saved)
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
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
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
    expected = reference_logits(source.tensors, saved, TOKENS)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_config_file_holds_every_field_and_auto_classes_find_the_model(tiny, export):
    folder, _, _ = export(tiny(rotary_base=123.0), dtype=torch.bfloat16)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    written = json.loads((folder / "config.json").read_text())
    parameters = inspect.signature(type(config)).parameters
    for field in set(parameters) - {"kwargs"}:
        # Of what other models have nothing is written.
        rare = ("noise", "run_ways", "is_shifted", "prefix_lm")
        expected = parameters[field].default if field in rare else written[field]
        assert getattr(config, field) == expected, field
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
    model = load(export(tiny(tie_embeddings=True))[0])
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
        export_to_hf(source, tiny(tie_embeddings=True), tmp_path / "export", **options)
    with pytest.raises(ConversionError, match=r"tokenizer\.json"):
        export_to_hf(source, tiny(), tmp_path / "export", **options | {"tokenizer_dir": tmp_path})
    assert not list(tmp_path.iterdir())


def imports_of(path):
    """Modules that a file imports: relative ones with a dot before, others by their first name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f".{node.module}" if node.level else node.module.partition(".")[0]


def test_every_module_that_travels_finds_its_neighbours_in_the_folder(tiny, export):
    names = [path.name for path in CODE_FILES]
    assert len(set(names)) == len(names)
    allowed = {"torch", "transformers", "numpy"} | sys.stdlib_module_names
    for path in CODE_FILES:
        for module in imports_of(path):
            if module.startswith("."):
                assert f"{module[1:]}.py" in names, f"{path.name} imports {module}"
            else:
                assert module in allowed, f"{path.name} imports {module}"
    folder, _, _ = export(tiny())
    assert {path.name for path in folder.glob("*.py")} == set(names)


def test_the_model_file_imports_every_other_one_itself():
    # transformers before 5.10 copies no others, and turns in circles where they lead back to it.
    imported = {
        path.name: {f"{name[1:]}.py" for name in imports_of(path) if name.startswith(".")}
        for path in CODE_FILES
    }
    assert imported["modeling_mdm.py"] == imported.keys() - {"modeling_mdm.py"}
    assert not imported["configuration_mdm.py"]
    assert all("modeling_mdm.py" not in names for names in imported.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_rounded_once_to_the_dtype(tiny, export, dtype):
    exact, _, _ = export(tiny(), "exact")
    rounded, _, _ = export(tiny(), "rounded", dtype=dtype)
    expected = load_file(exact / "model.safetensors")
    for name, tensor in load_file(rounded / "model.safetensors").items():
        assert torch.equal(tensor, expected[name].to(dtype))


def test_numbers_beyond_fp16_are_refused(tiny, random_source, tmp_path):
    source = random_source(tiny())
    source.tensors["decoder.final_layernorm.weight"][3] = -70000.0
    options = {"tokenizer_dir": None, "eos_token_id": None, "metadata": {}}
    with pytest.raises(ConversionError, match=r"model.norm.weight .* fp16 .*7e\+04.*bf16"):
        export_to_hf(source, tiny(), tmp_path / "a", dtype=torch.float16, **options)
    assert not list(tmp_path.iterdir())
    export_to_hf(source, tiny(), tmp_path / "a", dtype=torch.bfloat16, **options)


def test_a_full_disk_leaves_nothing(tiny, random_source, tmp_path):
    options = {"tokenizer_dir": None, "eos_token_id": None, "metadata": {}}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(ConversionError, match=r"a cannot be written \(File too large\): free"):
            export_to_hf(random_source(tiny()), tiny(), tmp_path / "a", **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    huge = tiny(ffn_hidden_size=10**13)
    with pytest.raises(ConversionError, match=r"bytes free, less than the \d+,"):
        export_to_hf(random_source(tiny()), huge, tmp_path / "a", **options)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from random_checkpoints import RandomSource, tiny_model
from megatron_mdm.hf.export import export_to_hf

class Dying(RandomSource):
    def load(self, name):
        if name == "decoder.final_layernorm.weight":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(name)

folder = Path(sys.argv[2])
options = {"tokenizer_dir": None, "eos_token_id": None, "metadata": {}, "overwrite": True}
export_to_hf(Dying(tiny_model(), 1), tiny_model(), folder, **options)
"""


def test_a_kill_leaves_a_hidden_folder_that_the_next_call_removes(tiny, export):
    folder, _, _ = export(tiny())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    command = [sys.executable, "-c", KILLED, Path(__file__).parents[2], folder]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (left,) = [path for path in folder.parent.iterdir() if path != folder]
    assert left.name.startswith(".export.partial-")
    # Another export that is under way, and a neighbour whose name begins alike, are not touched.
    alive = folder.with_name(f".export.partial-{os.getppid()}")
    other = folder.with_name(".export.other.partial-999999999")
    for path in (alive, other):
        path.mkdir()
    assert export(tiny())[2].reused
    assert set(folder.parent.iterdir()) == {folder, alive, other}


def test_a_kill_between_the_two_renames_loses_nothing(tiny, export):
    folder, _, _ = export(tiny())
    folder.rename(folder.with_name(".export.replaced-999999999"))
    with pytest.raises(ConversionError, match="--overwrite"):
        export(tiny(), seed=1)
    assert list(folder.parent.iterdir()) == [folder]
    assert export(tiny())[2].reused
