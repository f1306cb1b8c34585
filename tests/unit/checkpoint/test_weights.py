from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoint_examples import EMBEDDING, FC1, FC2, NORM, part_of
from safetensors.torch import load_file

from megatron_mdm.checkpoint.discovery import verify_checkpoint
from megatron_mdm.checkpoint.inspection import describe_checkpoint
from megatron_mdm.checkpoint.manifest import FORMAT_VERSION, SavedModel, read_saved_model
from megatron_mdm.checkpoint.storage import CheckpointReader, resolve_checkpoint
from megatron_mdm.checkpoint.weights import write_weights_checkpoint
from megatron_mdm.config import ModelConfig
from megatron_mdm.core.errors import CheckpointError, ConfigError
from megatron_mdm.diffusion.interpolation import HybridNoise, ShiftedNoise, UniformNoise

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=8,
    num_attention_heads=4,
    ffn_hidden_size=8,
    vocab_size=11,
    vocab_padding_multiple=4,
)
SECOND_FC2 = FC2.replace(".0.", ".1.")
SHAPES = {FC1: (16, 8), FC2: (8, 8), SECOND_FC2: (8, 8), NORM: (8,), EMBEDDING: (12, 8)}
STAGE_OF_TWO = {FC1: 0, FC2: 0, SECOND_FC2: 1, NORM: 1, EMBEDDING: 0}


class Source:
    def __init__(self, **changes):
        generator = torch.Generator().manual_seed(3)
        self.tensors = {
            name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()
        } | changes

    def list_names(self):
        return list(self.tensors)

    def load(self, name):
        return self.tensors[name]


def write(folder, source=None, **options):
    defaults = {"model": MODEL, "kind": "mdm", "seq_length": 16}
    return write_weights_checkpoint(source or Source(), SHAPES, folder, **(defaults | options))


@contextmanager
def files_of_at_most(num_bytes):
    """A full disk, as far as this process can tell: writing beyond the limit fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (4, 2)])
def test_each_rank_gets_its_part_of_every_tensor_as_float32(tmp_path, layout):
    tensor_size, num_stages = layout
    source = Source()
    source.tensors[FC1] = source.tensors[FC1].to(torch.bfloat16)
    options = {"tensor_parallel_size": tensor_size, "pipeline_parallel_size": num_stages}
    path = write(tmp_path / "out", source, max_file_bytes=300, **options)
    assert path == tmp_path / "out" / "step_00000000" == resolve_checkpoint(tmp_path / "out")
    assert sorted(file.name for file in path.parent.iterdir()) == ["latest", path.name]
    for rank in range(tensor_size):
        for stage in range(num_stages):
            found = {}
            for file in path.glob(f"weights-tp{rank}-pp{stage}-dp0-*.safetensors"):
                found |= load_file(file)
            expected = {
                f"weight/{name}": part_of(f"weight/{name}", whole.float(), rank, tensor_size)
                for name, whole in source.tensors.items()
                if (num_stages == 1 or STAGE_OF_TWO[name] == stage) and (name != NORM or rank == 0)
            }
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)
            assert all(tensor.dtype == torch.float32 for tensor in found.values())


def test_the_manifest_says_what_the_model_is_and_that_no_run_made_it(tmp_path):
    path = write(tmp_path, kind="ar", versions={"torch": "2"})
    manifest = verify_checkpoint(path)
    assert (manifest.format_version, manifest.kind, manifest.step) == (FORMAT_VERSION, "weights", 0)
    assert (manifest.data_fingerprint, manifest.state) == ("", {})
    assert manifest.environment is None
    assert manifest.config.keys() == {"model", "objective", "data"}
    assert read_saved_model(manifest) == SavedModel(MODEL, "ar", 16)
    tree = json.loads((path / "manifest.json").read_text())
    assert tree["config"]["model"]["vocab_size"] == 11
    assert "holds               weights alone, for run.initial_weights" in (
        describe_checkpoint(path).splitlines()
    )


def refusal(folder, kind=CheckpointError, **options):
    with pytest.raises(kind) as caught:
        write(folder, **options)
    message = str(caught.value)
    # A sentence for each thing that is wrong.
    for line in message.splitlines():
        assert line.endswith(".")
        assert not re.search(r"\. [A-Z]", line)
    return message


def test_weights_of_another_model_are_refused_and_leave_nothing(tmp_path):
    lacking, wrong = Source(), Source(**{NORM: torch.zeros(7)})
    del lacking.tensors[FC2]
    extra = Source(**{"output_layer.weight": torch.zeros(12, 8)})
    for source, expected in (
        (lacking, f"lack parameter {FC2} (1 such in all)"),
        (extra, "have the extra parameter output_layer.weight"),
        (wrong, f"hold {NORM} in the shape [7] where the model has [8]"),
    ):
        assert expected in refusal(tmp_path / "out", source=source)
    assert "tensor_model_parallel_size=3" in refusal(
        tmp_path / "out", ConfigError, tensor_parallel_size=3
    )
    assert not list(tmp_path.iterdir())


def test_what_lies_there_is_replaced_only_when_asked_and_a_run_never(tmp_path):
    path = write(tmp_path)
    changed = Source(**{NORM: torch.ones(8)})
    assert "exists: choose another output folder, or pass --overwrite" in refusal(tmp_path)
    # An overwriting that fails leaves the old one whole.
    with files_of_at_most(500):
        assert "cannot be written (File too large)" in refusal(
            tmp_path, source=changed, overwrite=True
        )
    verify_checkpoint(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["latest", path.name]
    write(tmp_path, changed, overwrite=True)
    reader = CheckpointReader(path)
    assert torch.equal(reader.load(NORM), torch.ones(8))
    (tmp_path / "step_00000007").mkdir()
    assert "holds step_00000007 of a run" in refusal(tmp_path, overwrite=True)


def test_a_full_disk_leaves_nothing(tmp_path):
    with files_of_at_most(500):
        assert "cannot be written" in refusal(tmp_path / "new")
    assert not list(tmp_path.iterdir())
    huge = dict.fromkeys(SHAPES, (2**30, 2**20))
    with pytest.raises(CheckpointError, match=r"bytes free, less than the 2[0-9,]+ that the"):
        write_weights_checkpoint(
            Source(), huge, tmp_path / "new", model=MODEL, kind="mdm", seq_length=16
        )
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_weights

class Dying(test_weights.Source):
    def load(self, name):
        if name == test_weights.NORM:
            print(sorted(os.listdir(sys.argv[2])), flush=True)
        if name == test_weights.EMBEDDING:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(name)

test_weights.write(test_weights.Path(sys.argv[2]), Dying())
"""


def test_a_kill_leaves_a_hidden_folder_that_the_next_call_removes(tmp_path):
    folder = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, Path(__file__).parent, folder]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert result.stdout == "['.step_00000000.tmp']\n"
    assert os.listdir(folder) == [".step_00000000.tmp"]
    assert os.listdir(folder / ".step_00000000.tmp")
    verify_checkpoint(write(folder))
    assert sorted(os.listdir(folder)) == ["latest", "step_00000000"]


def test_the_noise_of_a_model_is_kept(tmp_path):
    for noise in (HybridNoise(11, 0.2, 2.0), ShiftedNoise(11, -2.0), UniformNoise(11)):
        path = write(tmp_path / repr(noise)[:7], kind="mdm", noise=noise)
        assert read_saved_model(verify_checkpoint(path)) == SavedModel(MODEL, "mdm", 16, noise)
