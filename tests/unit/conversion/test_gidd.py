"""The published GIDD models' layout, against a plain module of the tests."""

from __future__ import annotations

import math

import pytest
import torch
from foreign_folders import edit, save_gidd
from transformers import AutoModelForMaskedLM

from megatron_mdm.checkpoint.manifest import read_manifest, read_saved_model
from megatron_mdm.core.errors import ConversionError
from megatron_mdm.diffusion.interpolation import ShiftedNoise
from megatron_mdm.hf.conversion.check import check_import
from megatron_mdm.hf.conversion.importing import (
    format_training_command,
    import_to_checkpoint,
    import_to_export,
)
from megatron_mdm.hf.formats.foreign import open_foreign
from megatron_mdm.hf.from_run import export_run

PUBLISHED = {}
VARIANTS = {
    # As the three published checkpoints are.
    "published": PUBLISHED,
    "masked": {"noise_type": -1000.0, "resid_scale": 1.5},
    "no-attention-bias": {"attention_bias": False, "mlp_bias": False},
    "no-qk-norm": {"use_qk_norm": False, "weight_scaling": "fan_in", "attn_soft_cap": 30.0},
    "no-biases-fan-out": {
        "attention_bias": False,
        "weight_scaling": "fan_out",
        "head_scaling": "fan_in",
        "rms_norm_eps": 1e-3,
        "rope_theta": 500.0,
    },
}


def some_tokens() -> torch.Tensor:
    return torch.randint(30, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_an_import_computes_what_a_plain_module_does(tmp_path, variant):
    model = save_gidd(tmp_path / "gidd", **VARIANTS[variant])
    source = open_foreign("gidd", tmp_path / "gidd")
    assert (source.saved.kind, source.saved.seq_length, source.eos_token_id) == ("mdm", 32, 1)
    result = import_to_export(source, tmp_path / "export")
    ours = AutoModelForMaskedLM.from_pretrained(result.path, trust_remote_code=True).eval()
    tokens = some_tokens()
    expected = model(tokens)
    assert expected.std() > 0.5
    # The mask token is never predicted.
    expected[..., 3] = -torch.inf
    torch.testing.assert_close(ours(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    written = ours.generate(tokens[:, :4], max_new_tokens=5, num_steps=3, seed=1)
    assert written.shape == (2, 9)
    assert (written[:, 4:] != 3).all()


@pytest.mark.parametrize("variant", ["published", "no-biases-fan-out"])
def test_a_checkpoint_runs_through_megatron_and_goes_on_as_an_export(tmp_path, variant):
    save_gidd(tmp_path / "gidd", **VARIANTS[variant])
    source = open_foreign("gidd", tmp_path / "gidd")
    checkpoint = import_to_checkpoint(source, tmp_path / "weights", tensor_parallel_size=2)
    check = check_import(source, checkpoint)
    assert check.passed
    assert "our own reading" in check.describe()
    export = import_to_export(source, tmp_path / "export").path
    assert check_import(source, export).passed
    assert check_import(open_foreign("hf", export), checkpoint).passed
    # Not because the comparison sees nothing.
    other = save_gidd(tmp_path / "other", **VARIANTS[variant] | {"resid_scale": 4.1})
    assert other is not None
    assert not check_import(open_foreign("gidd", tmp_path / "other"), export).passed


def test_the_noise_is_recorded_and_part_of_the_next_command(tmp_path):
    save_gidd(tmp_path / "gidd", noise_type=-0.5)
    source = open_foreign("gidd", tmp_path / "gidd")
    # The mask token is one of the 30.
    assert source.saved.noise == ShiftedNoise(29, -0.5)
    checkpoint = import_to_checkpoint(source, tmp_path / "weights")
    manifest = read_manifest(checkpoint)
    process = {"kind": "hybrid", "shift": -0.5}
    assert manifest.config["objective"] == {"kind": "mdm", "process": process}
    assert read_saved_model(manifest) == source.saved
    for export in (
        import_to_export(source, tmp_path / "export").path,
        export_run(checkpoint, tmp_path / "from-checkpoint").path,
    ):
        found = open_foreign("hf", export).saved
        assert (found.kind, found.noise) == ("mdm", source.saved.noise)
    command = format_training_command(checkpoint, source)
    for words in (
        "objective.process.kind=hybrid objective.process.shift=-0.5",
        "model.mask_token_id=3",
        "model.qk_norm=width model.attention_soft_cap=2.0 model.attention_sink=true",
        "model.mlp=relu2 model.mlp_bias=true",
    ):
        assert words in command


@pytest.mark.parametrize(
    ("stated", "noise"),
    [(math.inf, ShiftedNoise(29, 1000.0)), (1000.0, ShiftedNoise(29, 1000.0)), (-1000.0, None)],
)
def test_noise_may_be_all_uniform_or_all_masks(tmp_path, stated, noise):
    save_gidd(tmp_path, noise_type=stated)
    saved = open_foreign("gidd", tmp_path).saved
    assert (saved.kind, saved.noise) == ("mdm", noise)


def test_narrow_weights_are_read_as_they_are(tmp_path):
    model = save_gidd(tmp_path, torch.bfloat16)
    source = open_foreign("gidd", tmp_path)
    assert source.dtype == torch.bfloat16
    norm = source.load("decoder.final_layernorm.weight")
    assert torch.equal(norm, 1 + model.model.norm.weight.data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llada"}, "model_type='llada'"),
        ({"is_causal": True}, "is_causal=True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling="),
        ({"head_dim": 8}, "head_dim=8"),
        ({"weight_scaling": "fan"}, "weight_scaling='fan'"),
        ({"attn_soft_cap": None}, "attn_soft_cap=None"),
        ({"mask_token_id": 30}, "mask_token_id=30"),
        ({"mlp_bias": False}, "has the extra model.layers.0.mlp.down_proj.bias"),
        ({"attention_bias": ...}, "has the extra model.layers.0.self_attn.k_bias"),
        ({"num_hidden_layers": 2}, "has the extra model.layers.2."),
        ({"intermediate_size": 41}, "mlp.up_proj.weight in the shape"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path, changes, message):
    save_gidd(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ConversionError, match=message):
        open_foreign("gidd", tmp_path)
