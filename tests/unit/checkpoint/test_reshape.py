from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_examples import (
    EMBEDDING,
    FC1,
    FC2,
    NORM,
    change_manifest,
    part_of,
    whole_tensors,
    write_checkpoint,
)
from safetensors.torch import load_file

from megatron_mdm.checkpoint.discovery import choose_checkpoint, verify_checkpoint
from megatron_mdm.checkpoint.reshape import reshard_checkpoint
from megatron_mdm.checkpoint.storage import CheckpointReader
from megatron_mdm.config import parse_config
from megatron_mdm.core.errors import CheckpointError, ConfigError
from megatron_mdm.distributed.mesh import Mesh

REPOSITORY = Path(__file__).resolve().parents[3]

ALONE = Mesh(torch.device("cpu"))
TOOL = Path(__file__).resolve().parents[3] / "tools" / "convert_checkpoint.py"
# TP and PP.
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]
STAGE_OF_TWO = {EMBEDDING: 0, FC1: 0, FC2: 0, NORM: 1}


def config(**parallel):
    tree = {
        "run": {"dir": "unused"},
        "model": {
            "num_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 4,
            "ffn_hidden_size": 8,
            "vocab_size": 12,
            "vocab_padding_multiple": 4,
        },
        "objective": {"kind": "mdm"},
        "data": {"train": [{"path": "unused"}], "seq_length": 8},
        "batch": {"micro_batch_size": 1, "global_batch_size": 4},
        "schedule": {"steps": 30},
        "parallel": parallel,
    }
    return parse_config(tree).model_dump(mode="json")


@pytest.fixture(scope="module")
def reshaped(tmp_path_factory):
    """A checkpoint of one process, written anew for every layout."""
    root = tmp_path_factory.mktemp("reshaped")
    source = write_checkpoint(root / "source", config=config(zero_stage=3))
    return {
        (tensor, pipeline): reshard_checkpoint(
            source,
            root / f"{tensor}-{pipeline}",
            tensor_parallel_size=tensor,
            pipeline_parallel_size=pipeline,
            max_file_bytes=200,
        )
        for tensor, pipeline in LAYOUTS
    }


def assert_holds_all(path):
    reader = CheckpointReader(path)
    for key, expected in whole_tensors().items():
        kind, _, name = key.partition("/")
        assert torch.equal(reader.load(name, kind), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_gets_the_files_that_it_would_have_written(reshaped, layout):
    path, (tensor_size, num_stages) = reshaped[layout], layout
    for rank in range(tensor_size):
        for stage in range(num_stages):
            found = {}
            for file in path.glob(f"*-tp{rank}-pp{stage}-dp0-*.safetensors"):
                found |= load_file(file)
            expected = {
                key: part_of(key, whole, rank, tensor_size)
                for key, whole in whole_tensors().items()
                if (name := key.partition("/")[2])
                and (num_stages == 1 or STAGE_OF_TWO[name] == stage)
                and (name != NORM or rank == 0)
            }
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("back", LAYOUTS)
def test_any_layout_becomes_any_other_and_loses_nothing(reshaped, tmp_path, layout, back):
    path = reshard_checkpoint(
        reshaped[layout], tmp_path, tensor_parallel_size=back[0], pipeline_parallel_size=back[1]
    )
    manifest = verify_checkpoint(path)
    assert_holds_all(path)
    assert (manifest.layout.tensor_parallel_size, manifest.layout.pipeline_parallel_size) == back
    assert manifest.config["parallel"]["tensor_model_parallel_size"] == back[0]
    assert (manifest.step, manifest.consumed_samples) == (20, 160)
    assert choose_checkpoint(tmp_path, "refuse", ALONE) == path
    assert not list(tmp_path.glob(".*"))


def test_a_file_holds_no_more_than_it_may(reshaped):
    largest = 4 * 16 * 3
    for path in reshaped.values():
        for file in path.glob("*.safetensors"):
            tensors = load_file(file)
            held = sum(4 * tensor.numel() for tensor in tensors.values())
            assert held <= max(200, largest)


def test_weights_alone_are_divided_anew_and_stay_weights_alone(tmp_path):
    run = config()
    partial = {"model": run["model"], "objective": {"kind": "mdm"}, "data": {"seq_length": 8}}
    changes = {"kind": "weights", "config": partial, "data_fingerprint": ""}
    source = write_checkpoint(tmp_path / "source", step=0, **changes)

    def forget_moments(manifest):
        manifest["files"] = {n: r for n, r in manifest["files"].items() if "optimizer" not in n}

    change_manifest(source, forget_moments)
    path = reshard_checkpoint(
        source, tmp_path / "out", tensor_parallel_size=2, pipeline_parallel_size=2
    )
    manifest = verify_checkpoint(path)
    assert (manifest.kind, manifest.step, manifest.config) == ("weights", 0, partial)
    assert {file.partition("-")[0] for file in manifest.files} == {"weights"}
    reader = CheckpointReader(path)
    for name in STAGE_OF_TWO:
        assert torch.equal(reader.load(name), whole_tensors()[f"weight/{name}"])
    with pytest.raises(ConfigError, match="tensor_model_parallel_size=3 does not divide"):
        reshard_checkpoint(
            source, tmp_path / "other", tensor_parallel_size=3, pipeline_parallel_size=1
        )
    assert not (tmp_path / "other").exists()


def test_a_model_that_does_not_divide_is_refused(reshaped, tmp_path):
    with pytest.raises(ConfigError, match="pipeline_model_parallel_size=3 does not divide"):
        reshard_checkpoint(
            reshaped[1, 1], tmp_path, tensor_parallel_size=1, pipeline_parallel_size=3
        )
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_and_a_used_output_are_refused(reshaped, tmp_path):
    path = write_checkpoint(tmp_path, config=config())
    with pytest.raises(CheckpointError, match="exists: choose another output folder"):
        reshard_checkpoint(
            reshaped[1, 1], tmp_path, tensor_parallel_size=2, pipeline_parallel_size=1
        )
    next(path.glob("weights-*")).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        reshard_checkpoint(
            path, tmp_path / "other", tensor_parallel_size=2, pipeline_parallel_size=1
        )
    assert not (tmp_path / "other").exists()


def run_tool(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [str(TOOL), *(str(word) for word in words)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOL), run_name="__main__")
    return ended.value.code


def test_the_tool_reshapes_and_inspects(reshaped, tmp_path, monkeypatch, capsys):
    source, output = reshaped[1, 2], tmp_path / "checkpoints"
    words = ["reshape", "--checkpoint", source, "--output", output, "--tensor-parallel", "2"]
    assert run_tool(monkeypatch, *words) == 0
    path = output / "step_00000020"
    assert f"wrote {path} for 2 tensor-parallel ranks and 1 pipeline stages" in (
        capsys.readouterr().out
    )
    assert run_tool(monkeypatch, "inspect", path) == 0
    out = capsys.readouterr().out
    for line in (
        "holds               weights and optimizer state of a run",
        "layout              2 ranks: 2 tensor-parallel x 1 stages x 1 replicas, ZeRO-2",
        "threads per process 1 and 2",
        "processor           a CPU, AVX2",
        "versions            torch 2",
        "parameters          4 tensors, 111 numbers",
        f"  {FC1}  [16, 3]",
        "whole: 4 files have the sizes and checksums of their manifest",
    ):
        assert line in out
    assert_holds_all(path)
    file = next(path.glob("optimizer-tp1-*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert run_tool(monkeypatch, "inspect", path) == 2
    captured = capsys.readouterr()
    assert "whole:" not in captured.out
    assert captured.err.startswith(f"error: {file} has {len(content)} bytes with sha256 ")


def test_offline_tools_import_neither_megatron_nor_deepspeed():
    code = (
        "import sys, megatron_mdm.checkpoint.discovery, megatron_mdm.hf.conversion.commands\n"
        "sys.exit(any(name.split('.')[0] in ('megatron', 'deepspeed') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
