"""tools/finetune_lora.py: from export to export, and a clear sentence for what does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from adapter_examples import SIZES, tree_of, write_pairs, write_tokenizer, write_tree

from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.core.options import run_command
from megatron_mdm.data.manifest import Manifest, manifest_path
from megatron_mdm.data.shards import prompts_path
from megatron_mdm.diffusion.interpolation import HybridNoise
from megatron_mdm.hf.adapters.command import finetune
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.requests import Request, ScoringSettings
from megatron_mdm.inference.scoring import Scorer


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(export, tiny, tmp_path):
    tokenizer = write_tokenizer(tmp_path / "bytes")
    return export(tiny(**SIZES), tokenizer_dir=tokenizer, eos_token_id=256)[0]


@pytest.fixture
def prefix(tmp_path, folder):
    return write_pairs(tmp_path, tmp_path / "bytes")


@pytest.fixture
def tool(tmp_path, folder, prefix):
    """Runs the tool with further words on the command line."""

    def call(*words, model=folder, **sections):
        # What the export decides is not in the file.
        tree = tree_of(prefix, **sections) | {"finetuning": {"fill_to": 0}}
        path = write_tree(tmp_path / "run.yaml", tree)
        out = [] if "--out" in words else ["--out", str(tmp_path / "adapter")]
        given = ["--model", str(model), "--config", str(path), *out, *map(str, words)]
        run_command(finetune, None, given)

    return call


def test_the_merged_export_knows_what_it_was_taught(tool, folder, prefix, tmp_path, capsys):
    sections = {"validation": {"every_steps": 20}, "reporting": {"log_every_steps": 10}}
    sections["data"] = {"valid": [{"path": str(prefix)}]}
    tool("--merge", tmp_path / "merged", "--rank", 8, "schedule.steps=40", **sections)
    told = capsys.readouterr().out
    assert "parameters are learned" in told
    assert "step   40/40" in told
    assert "valid at step 20" in told
    line = json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])
    scores = []
    for model in (folder, tmp_path / "merged"):
        loaded = ExportedModel(model)
        ids = [tuple(loaded.tokenizer.encode(line[key])) for key in ("prompt", "response")]
        scorer = Scorer(loaded, ScoringSettings("chain_rule"))
        scores.append(scorer.score([Request(*ids)])[0].log_likelihood)
    assert scores[1] > scores[0] + 1
    found = json.loads((tmp_path / "merged/training_metadata.json").read_text())
    assert found["steps"] == 3
    assert found["lora"]["adapter"]["rank"] == 8
    assert found["lora"]["records"][-1]["step"] == 40
    assert "Low-rank adapters" in (tmp_path / "merged/README.md").read_text()
    assert found["lora"] == json.loads((tmp_path / "adapter/training_metadata.json").read_text())
    assert not torch.distributed.is_initialized()


def refusal(tool, *words, kind=ConfigError, **options):
    with pytest.raises(kind) as caught:
        tool(*words, **options)
    return str(caught.value)


def test_bad_options_are_refused_before_anything_starts(tool, tmp_path):
    assert "--rank=0 is less than 1" in refusal(tool, "--rank", 0)
    assert "--alpha=-1.0 has to be above 0" in refusal(tool, "--alpha", -1)
    assert "--dropout=1.0 is not in [0, 1)" in refusal(tool, "--dropout", 1)
    # Its adapter would be passed by: the output layer is used as a matrix.
    assert "--target=lm_head is no matrix of a block" in refusal(tool, "--target", "lm_head")
    (tmp_path / "adapter").mkdir()
    assert "adapter exists already" in refusal(tool)


def test_a_run_of_another_model_is_refused(tool, folder, tmp_path):
    assert "model.hidden_size=32, but" in refusal(tool, "model.hidden_size=32")
    assert "model.mask_token_id=3, but" in refusal(tool, "model.mask_token_id=3")
    assert "data.seq_length=64 is longer than the 48" in refusal(tool, "data.seq_length=64")
    assert "is no exported model" in refusal(tool, model=tmp_path)
    size = (folder / "model.safetensors").stat().st_size
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(size // 2)
    assert "cannot be loaded" in refusal(tool)
    assert not (tmp_path / "adapter").exists()


def test_a_smaller_vocabulary_fits_and_a_larger_one_gets_advice_that_can_be_taken(
    tool, folder, prefix, tmp_path
):
    path = manifest_path(prefix)
    manifest = Manifest.read(path)
    manifest.model_copy(update={"vocab_size": 258}).write(path)
    told = refusal(tool, kind=DataError)
    # What the export holds cannot be set.
    assert told.endswith(
        f"more than the 257 of {folder}: run mdm prepare again with the tokenizer of {folder}."
    )
    manifest.model_copy(update={"vocab_size": 200}).write(path)
    assert "model.padded_vocab_size=300, but" in refusal(tool, "model.padded_vocab_size=300")
    tool("schedule.steps=1")
    assert (tmp_path / "adapter").is_dir()


def test_shards_that_do_not_fit_are_refused(tool, folder, prefix, tmp_path):
    path = folder / "tokenizer.json"
    text = path.read_text()
    other = text.replace('"add_prefix_space": false', '"add_prefix_space": true')
    assert other != text
    path.write_text(other)
    assert "tokenizer" in refusal(tool, kind=DataError)
    path.write_text(text)
    prompts_path(prefix).unlink()
    assert "mdm prepare-finetuning" in refusal(tool, kind=DataError)


def test_an_export_of_other_noise_than_masks_is_refused(tool, export, tiny):
    saved = tiny(**SIZES)._replace(noise=HybridNoise(257, 0.2))
    told = refusal(tool, model=export(saved, "time", tokenizer_dir=None)[0])
    assert "was trained on hybrid or uniform noise, and adapters learn to fill in masks" in told
