"""A proof's pack on another machine: another Python, PyTorch, transformers and numpy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
# Of a GPU machine as lent out; its PyTorch is the build for CUDA where pip's index has no other.
THERE = (
    *("torch==2.11.0", "transformers==5.17.0", "numpy==2.5.2", "huggingface-hub==1.33.0"),
    *("tokenizers==0.23.2", "tiktoken==0.14.0", "safetensors==0.8.0", "accelerate", "peft"),
    *("einops", "matplotlib", "msgpack", "ninja", "psutil", "py-cpuinfo", "pyarrow", "rich"),
    *("scipy", "tensorboard"),
)
# They came with the packages above, and the other machine lacks them.
NOT_THERE = ("annotated-types", "pydantic", "pydantic-core", "typing-inspection")
NEEDED_BYTES = 12 * 2**30


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | environment,
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def find_python(version: str) -> Path | None:
    """Another Python: on the PATH, or one of pyenv's; not all that are on the PATH can start."""
    found = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for python in (found, *sorted(pyenv.glob(f"versions/{version}.*/bin/python"))):
        command = [str(python), "-c", "import ensurepip, ssl"]
        if python and subprocess.run(command, capture_output=True).returncode == 0:
            return Path(python)
    return None


@pytest.fixture(scope="session")
def other_python(tmp_path_factory, ask_registry) -> Iterator[Path]:
    """The Python of a fresh environment with what such a machine has; PROOF_PYTHON: that one."""
    if given := os.environ.get("PROOF_PYTHON"):
        yield Path(given)
        return
    python = find_python("3.12")
    folder = tmp_path_factory.mktemp("machine")
    if python is None:
        pytest.skip("no Python 3.12")
    if shutil.disk_usage(folder).free < NEEDED_BYTES:
        pytest.skip(f"{folder} has less than {NEEDED_BYTES >> 30} GiB free")
    run(python, "-m", "venv", folder)
    pip = (folder / "bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "install", "--no-compile", *THERE)
    run(*pip, "uninstall", "--yes", *NOT_THERE)
    yield folder / "bin/python"
    # pytest would keep the gigabytes of its last three sessions.
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def proof_pack(other_python, tmp_path_factory) -> Path:
    """A pack of exactly what that environment lacks."""
    folder = tmp_path_factory.mktemp("proof")
    freeze = run(other_python, "-m", "pip", "list", "--format=freeze")
    (folder / "there.txt").write_text(freeze)
    packing = (sys.executable, "tools/gpu_proof.py", "pack", "--out", folder / "pack")
    run(*packing, "--installed", folder / "there.txt")
    return folder / "pack"


@pytest.fixture(scope="session")
def site(other_python, proof_pack, tmp_path_factory) -> Path:
    """Where the other machine has the pack's packages, installed without asking anyone."""
    folder = tmp_path_factory.mktemp("site")
    wheels = sorted((proof_pack / "wheels").iterdir())
    pip = (other_python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
    run(*pip, "--no-compile", "--target", folder, *wheels)
    return folder


def test_a_pack_is_small_and_holds_what_is_missing_alone(proof_pack):
    manifest = json.loads((proof_pack / "manifest.json").read_text())
    assert {"deepspeed", "megatron-core", "cyclopts", "pydantic"} <= manifest["packages"].keys()
    assert {"torch", "transformers", "numpy"} <= manifest["expected"].keys()
    assert sum(one["bytes"] for one in manifest["files"]) < 20 * 2**20


def test_every_stage_runs_there(other_python, proof_pack, site, tmp_path):
    """With the smallest sizes, on the losses of this environment's CPU."""
    where = ("--pack", proof_pack, "--out", tmp_path, "--device", "cpu", "--tiny")
    command = ("tools/gpu_proof.py", "run", *where, "--minutes", "15")
    run(other_python, *command, PYTHONPATH=str(site))
    reports = {
        path.stem: json.loads(path.read_text())["commands"] for path in tmp_path.glob("*.json")
    }
    assert len(reports) == 11
    versions = reports["environment"][0]["report"]["machine"]["versions"]
    assert versions["python"].startswith("3.12.")
    assert versions["torch"].startswith("2.11.0")
    assert reports["parity"][0]["report"]["results"]["num_failed"] == 0
