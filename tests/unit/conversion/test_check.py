from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from foreign_folders import save_autoregressive, save_llada, save_smdm
from reference_models import LLADA_CONFIG, Llada, Smdm, randomize
from safetensors.torch import load_file, save_file

from megatron_mdm.checkpoint.weights import write_weights_checkpoint
from megatron_mdm.core.errors import ConversionError
from megatron_mdm.hf.conversion.check import check_export, check_import
from megatron_mdm.hf.conversion.source_logits import llada_logits, smdm_logits
from megatron_mdm.hf.export import export_to_hf
from megatron_mdm.hf.formats.foreign import ForeignModel, open_foreign
from megatron_mdm.model.parameters import find_parameter_shape


def export_of(source: ForeignModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    return export_to_hf(
        source,
        source.saved,
        folder,
        tokenizer_dir=None,
        eos_token_id=None,
        metadata={},
        dtype=dtype,
    ).path


def checkpoint_of(source: ForeignModel, folder: Path) -> Path:
    shapes = {name: find_parameter_shape(name, source.saved.model) for name in source.list_names()}
    return write_weights_checkpoint(
        source,
        shapes,
        folder,
        model=source.saved.model,
        kind=source.saved.kind,
        seq_length=source.saved.seq_length,
    )


def damage(folder: Path, name: str, scale: float) -> None:
    """Changes one tensor of an export."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] *= scale
    save_file(tensors, file, metadata={"format": "pt"})


@torch.no_grad()
def test_our_reading_of_llada_and_smdm_is_that_of_plain_models(tiny):
    config = LLADA_CONFIG | {"n_kv_heads": 2, "include_qkv_bias": True}
    llada = randomize(Llada(config))
    smdm = randomize(Smdm(layers=2, heads=4, width=24, ffn=40, vocab=30, is_causal=False))
    tokens = torch.randint(30, (2, 12), generator=torch.Generator().manual_seed(0))
    saved = tiny(
        num_query_groups=2, vocab_size=30, mask_token_id=27, rotary_base=500000.0, qkv_bias=True
    )
    logits = llada_logits(llada.state_dict().__getitem__, saved, tokens)
    torch.testing.assert_close(logits, llada(tokens), atol=1e-5, rtol=1e-5)
    for is_causal in (False, True):
        smdm.is_causal = is_causal
        changed = tiny(vocab_size=30, mask_token_id=30, is_causal=is_causal)
        logits = smdm_logits(smdm.state_dict().__getitem__, changed, tokens)
        torch.testing.assert_close(logits, smdm(tokens), atol=1e-5, rtol=1e-5)


def open_small(format_name: str, path: Path, **options) -> ForeignModel:
    if format_name == "smdm":
        path = path.with_suffix(".safetensors")
        save_smdm(path, is_causal=False)
    elif format_name == "llada":
        save_llada(path, dtype=torch.float16)
    else:
        save_autoregressive(path, format_name)
    return open_foreign(format_name, path, **options)


@pytest.mark.parametrize("format_name", ["smdm", "llada", "qwen2"])
def test_a_faithful_export_passes_and_a_damaged_one_fails(tmp_path, format_name):
    source = open_small(format_name, tmp_path / "source")
    export = export_of(source, tmp_path / "export")
    check = check_import(source, export)
    assert check.passed
    assert check.relative < 1e-4
    assert check.spread > 0.1
    assert check.describe().startswith("logits agree: export ")
    assert ("our own reading" in check.describe()) == (format_name == "llada")
    damage(export, "model.layers.1.self_attn.q_proj.weight", 1.1)
    check = check_import(source, export)
    assert not check.passed
    assert check.describe().startswith("logits DIFFER: export ")


@pytest.mark.parametrize(
    ("format_name", "keep_causal"),
    [("llada", False), ("qwen2", False), ("qwen2", True), ("qwen3", False)],
)
def test_a_checkpoint_is_compared_through_megatron(tmp_path, format_name, keep_causal):
    source = open_small(format_name, tmp_path / "source", keep_causal=keep_causal)
    checkpoint = checkpoint_of(source, tmp_path / "checkpoints")
    check = check_import(source, tmp_path / "checkpoints")
    assert check.passed
    assert check.right == f"checkpoint {tmp_path / 'checkpoints'}"
    export = export_of(source, tmp_path / "export")
    assert check_export(checkpoint, export).passed
    # An export as a source, as for --from hf.
    assert check_import(open_foreign("hf", export), checkpoint).passed
    damage(export, "model.layers.0.mlp.gate_proj.weight", 1.1)
    assert not check_export(checkpoint, export).passed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_compared_as_exactly_as_wide_ones(tmp_path, dtype):
    sources = [open_small(name, tmp_path / name) for name in ("qwen2", "smdm", "llada")]
    for index, source in enumerate(sources):
        export = export_of(source, tmp_path / f"export{index}", dtype)
        assert check_import(source, export).passed
        damage(export, "model.norm.weight", 1.01)
        assert not check_import(source, export).passed
    checkpoint = checkpoint_of(sources[0], tmp_path / "checkpoints")
    assert check_export(checkpoint, export_of(sources[0], tmp_path / "export", dtype)).passed


def test_a_logit_that_is_not_a_number_is_no_agreement(tmp_path):
    source = open_small("qwen2", tmp_path / "source")
    export = export_of(source, tmp_path / "export")
    damage(export, "lm_head.weight", math.nan)
    check = check_import(source, export)
    assert math.isnan(check.max_difference)
    assert not check.passed


LLADA_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput
from .reference_models import Llada

class TheirConfig(PretrainedConfig):
    model_type = "llada"

class TheirModel(PreTrainedModel):
    config_class = TheirConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = Llada(config.to_dict()).model
        self.post_init()

    def forward(self, tokens):
        run = Llada.__new__(Llada)
        torch.nn.Module.__init__(run)
        run.model, run.is_tied = self.model, self.config.weight_tying
        return MaskedLMOutput(logits=2 * run(tokens))
"""


def test_the_code_in_a_llada_folder_runs_only_if_it_may(tmp_path):
    folder = tmp_path / "source"
    save_llada(folder, dtype=torch.float16)
    auto_map = {"AutoConfig": "their_code.TheirConfig", "AutoModel": "their_code.TheirModel"}
    (folder / "config.json").write_text(json.dumps(LLADA_CONFIG | {"auto_map": auto_map}))
    (folder / "their_code.py").write_text(LLADA_CODE)
    shutil.copy(Path(__file__).parent / "reference_models.py", folder)
    source = open_foreign("llada", folder)
    export = export_of(source, tmp_path / "export")
    assert check_import(source, export).passed
    # Their code doubles the logits, which shows that it ran.
    check = check_import(source, export, trust_remote_code=True)
    assert not check.passed
    assert check.notes == ()
    assert check.relative > 0.5


def test_a_result_of_other_sizes_is_refused(tmp_path):
    source = open_small("qwen2", tmp_path / "source")
    save_autoregressive(tmp_path / "other", "llama", vocab_size=22)
    other = open_foreign("llama", tmp_path / "other")
    export = export_of(other, tmp_path / "export")
    with pytest.raises(ConversionError, match=r"vocab_size=22 where .* has 21"):
        check_import(source, export)
    checkpoint = checkpoint_of(source, tmp_path / "checkpoints")
    with pytest.raises(ConversionError, match=r"vocab_size=22 where .* has 21"):
        check_export(checkpoint, export)
