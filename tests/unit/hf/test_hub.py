"""Names of the hub as inputs, and uploads, against a stand-in of the hub's HTTP interface.

The library reads its address and whether it is offline once, when it is imported: each part runs
in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stand_in import COMMIT, TOKEN, Hub, serve

REPO = Path(__file__).resolve().parents[3]
FIND = """\
import json, sys
from pathlib import Path
from megatron_mdm.core.errors import ConversionError
from megatron_mdm.hf.hub import locate_model
for name in sys.argv[1:]:
    try:
        found = locate_model(Path(name))
        files = sorted(found.path.iterdir()) if found.path.is_dir() else [found.path]
        texts = {file.name: file.read_text() for file in files if file.is_file()}
        print(json.dumps([found.name, texts]))
    except ConversionError as error:
        print(json.dumps([str(error)]))
"""


def run(*command: object, cwd: Path = REPO, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of the project with a cache of its own."""
    base = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables = {
        "PYTHONPATH": str(REPO),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=base | variables | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def find(folder: Path, *names: str, **environment: str) -> list[list]:
    """What each of the names leads to, seen from a folder."""
    done = run("-c", FIND, *names, cwd=folder, HF_HOME=str(folder / "home"), **environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def hub() -> Hub:
    hub = Hub()
    hub.files["them/model"] = {
        "config.json": b"{}",
        "model.safetensors": b"numbers",
        "pytorch_model.bin": b"a pickle",
        "modeling.py": b"code",
        "original/other.safetensors": b"other numbers",
    }
    hub.files["them/pickles"] = {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}
    hub.files["them/secret"] = hub.files["them/model"]
    hub.private.add("them/secret")
    return hub


def test_names_of_the_hub_and_folders(hub, tmp_path):
    (tmp_path / "them/local").mkdir(parents=True)
    (tmp_path / "them/local/config.json").write_text("mine")
    hub.files["them/local"] = hub.files["them/model"]
    names = ("them/model", "them/model@v1", "them/model/original/other.safetensors", "them/local")
    wanted = {"config.json": "{}", "model.safetensors": "numbers"}
    with serve(hub) as address:
        whole, tagged, one, local = find(tmp_path, *names, HF_ENDPOINT=address)
    assert whole == tagged == [f"them/model@{COMMIT}", wanted]
    name = f"them/model/original/other.safetensors@{COMMIT}"
    assert one == [name, {"other.safetensors": "other numbers"}]
    assert local == ["local", {"config.json": "mine"}]
    assert not [request for request in hub.requests if request.endswith((".bin", ".py"))]
    # The hub is gone now: what was downloaded is still there.
    assert find(tmp_path, "them/model", HF_ENDPOINT=address) == [whole]
    assert find(tmp_path, "them/model", HF_HUB_OFFLINE="1") == [whole]
    (offline,) = find(tmp_path, "them/more", HF_HUB_OFFLINE="1")
    (gone,) = find(tmp_path, "them/more", HF_ENDPOINT=address)
    cache = tmp_path / "home/hub"
    start = f"them/more is no folder or file here, and them/more is not in the hub's cache {cache}"
    remedy = "run `hf download them/more` on a machine with a network and copy its HF_HOME here"
    assert offline[0].startswith(f"{start}, while HF_HUB_OFFLINE is set: {remedy}")
    assert gone[0].startswith(f"{start}, while {address} cannot be reached: {remedy}")


def test_what_the_hub_does_not_have_is_one_sentence(hub, tmp_path):
    names = ["them/none", "them/secret", "them/model@v9", "them/model/none.safetensors"]
    with serve(hub) as address:
        sentences = find(tmp_path, *names, "them/pickles", HF_ENDPOINT=address)
        (seen,) = find(tmp_path, "them/secret", HF_ENDPOINT=address, HF_TOKEN=TOKEN)
    assert seen[0] == f"them/secret@{COMMIT}"
    parts = [
        f"them/none is no folder or file here, and {address} shows no model them/none: correct",
        f"{address} shows no model them/secret: correct the name, or if it is private run `hf auth",
        "them/model has no revision v9: give a branch, tag or commit of ",
        f"them/model has no such file: {address}/them/model/tree/main shows its files.",
        "them/pickles has no .safetensors at its top, and other files of weights can run code",
    ]
    for (sentence,), part in zip(sentences, parts, strict=True):
        assert part in sentence


def test_an_import_and_uploads(hub, export, tiny, weights_checkpoint, tmp_path):
    folder = export(tiny())[0]
    hub.files["them/model"] = {file.name: file.read_bytes() for file in folder.iterdir()}
    convert = "tools/convert_checkpoint.py"
    again, exported = tmp_path / "again", tmp_path / "exported"
    with serve(hub) as address:
        common = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        imported = run(
            convert, "from-hf", "them/model@v1", "--to", "hf", "--output", again, **common
        )
        assert imported.returncode == 0, imported.stderr
        words = (convert, "to-hf", "--run", weights_checkpoint(tmp_path / "weights"))
        words = (*words, "--output", exported, "--push", "open/model", "--public")
        refused = run(*words, **common)
        assert not exported.exists()
        common["HF_TOKEN"] = TOKEN
        both = [run(*words, **common), run(convert, "push", again, "mine", **common)]
    card = (again / "README.md").read_text().replace("\\", "")
    assert f"a model of the format hf, them/model@{COMMIT}." in card
    assert refused.stderr.startswith("error: open/model cannot be uploaded without a token of the ")
    for done, source, name in zip(both, (exported, again), ("open/model", "me/mine"), strict=True):
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"uploaded to {address}/{name}"
        assert hub.made[name]["visibility"] == ("public" if source == exported else "private")
        assert {*hub.files[name]} == {file.name for file in source.iterdir()}
        for file, data in hub.files[name].items():
            assert file == "README.md" or data == (source / file).read_bytes()
        assert f'from_pretrained("{name}", trust' in hub.files[name]["README.md"].decode()
