from __future__ import annotations

import hashlib
import json
import shlex
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.studies.benchmarks.parity_cases import write_shards
from megatron_mdm.studies.proof.packing import (
    Content,
    check_is_free,
    check_pack,
    copy_shards,
    fetch_wheel,
    format_start,
    pack,
    write_pack,
)
from megatron_mdm.studies.steps import REPO

PURE = "setup(name='odd', version='1', py_modules=['odd'])"
# Says that it is compiled, which is all that a wheel's name depends on.
COMPILED = """
class Compiled(Distribution):
    def has_ext_modules(self):
        return True

setup(name='odd', version='1', py_modules=['odd'], distclass=Compiled)
"""


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes for all that is published; nothing is asked for over a network."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    # pip's own reading of the variable: false is the opposite of the option, no isolation. What
    # builds packages is this environment's, since there is no other.
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "false")
    return folder


def publish_wheel(registry: Path, name: str, version: str, tag: str) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(registry / f"{name}-{version}-{tag}.whl", "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"
        )
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}")
        wheel.writestr(f"{info}/RECORD", "")


def publish_source(registry: Path, folder: Path, setup: str) -> None:
    source = folder / "odd-1"
    source.mkdir()
    (source / "setup.py").write_text(f"from setuptools import Distribution, setup\n{setup}\n")
    (source / "odd.py").touch()
    with tarfile.open(registry / "odd-1.tar.gz", "w:gz") as archive:
        archive.add(source, "odd-1")


def content(name: str, text: str) -> Content:
    def write(folder: Path) -> dict[str, str]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        return {name: f"{len(text)} letters"}

    return write


def fail(folder: Path) -> dict[str, str]:
    (folder / "half").touch()
    raise DataError("the rest is missing.")


def test_a_pack_says_what_is_in_it_and_replaces_an_older_one(tmp_path):
    out = tmp_path / "deep" / "pack"
    write_pack(out, [content("old", "abc")], 100)
    write_pack(out, [content("wheels/one", "abcde"), content("two", "")], 100)
    files = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    assert sorted(files) == ["manifest.json", "two", "wheels/one"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["two"] == "0 letters"
    assert manifest["files"] == [
        {"name": name, "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        for name, text in (("two", b""), ("wheels/one", b"abcde"))
    ]
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (fail, "the rest is missing"),
        (
            content("large", "x" * 3 * 2**20),
            r"has 3\.0 MiB and may have 2 \(large has 3\.0\): name",
        ),
    ],
)
def test_what_cannot_be_packed_leaves_the_older_pack(tmp_path, bad, message):
    out = tmp_path / "pack"
    write_pack(out, [content("old", "abc")], 100)
    with pytest.raises(DataError, match=message):
        write_pack(out, [content("new", "abc"), bad], 2 * 2**20)
    assert (out / "old").read_text() == "abc"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("text", [None, "{}", '{"format": "another"}', "[]", "no JSON"])
def test_only_a_pack_is_replaced(tmp_path, text):
    out = tmp_path / "pack"
    check_is_free(out)
    out.mkdir()
    if text is not None:
        (out / "manifest.json").write_text(text)
    with pytest.raises(ConfigError, match=r"^--out=.*pack exists and is no pack: choose another"):
        pack(out)
    assert len(list(out.iterdir())) == (text is not None)


def test_the_command_is_one_for_a_shell_in_the_repository(tmp_path):
    inside = format_start(REPO / "a pack")
    assert "'a pack'/wheels/*.whl" in inside
    assert inside.endswith("run --pack 'a pack' --out proof")
    assert shlex.quote(str(tmp_path)) in format_start(tmp_path)
    # The shell takes it for one pip and one program with that folder.
    script = 'python3() { printf "%s|" "$@"; }; ' + inside
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, env={})
    assert done.stdout.endswith("|tools/gpu_proof.py|run|--pack|a pack|--out|proof|"), done.stderr
    assert len(inside) < 300
    assert format_start(REPO / "p", wheels=False) == inside.split("&& ")[1].split(" ", 1)[
        1
    ].replace("'a pack'", "p")
    with pytest.raises(
        ConfigError, match="--out is a path of 1001 characters, with which the comm"
    ):
        format_start(Path("/" + "x" * 1000))


def test_wheels_are_those_of_the_other_machine(registry, tmp_path):
    newest = "manylinux_2_17_x86_64"
    tags = ("cp311-cp311", "cp312-cp312", "cp313-cp313")
    for tag in (*(f"{tag}-{newest}" for tag in tags), "cp312-cp312-macosx_11_0_arm64"):
        publish_wheel(registry, "engine", "2", tag)
    publish_wheel(registry, "engine", "3", f"cp312-cp312-{newest}")
    publish_wheel(registry, "pure", "1", "py3-none-any")
    # Of a C library that the other machine may lack.
    publish_wheel(registry, "late", "1", "cp312-cp312-manylinux_2_35_x86_64")
    out = tmp_path / "wheels"
    out.mkdir()
    fetch_wheel("engine", "2", "3.12", out)
    fetch_wheel("pure", "1", "3.12.3", out)
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"engine-2-cp312-cp312-{newest}.whl", "pure-1-py3-none-any.whl"]
    with pytest.raises(DataError, match=r"^late 1 has no wheel for Python 3\.12 on x86-64 Linux"):
        fetch_wheel("late", "1", "3.12", out)
    assert len(list(out.iterdir())) == 2


def test_a_source_is_built_where_every_machine_can_use_it(registry, tmp_path):
    publish_source(registry, tmp_path, PURE)
    out = tmp_path / "wheels"
    out.mkdir()
    fetch_wheel("odd", "1", "3.12", out)
    assert [path.name for path in out.iterdir()] == ["odd-1-py3-none-any.whl"]


def test_a_source_that_compiles_is_refused(registry, tmp_path):
    publish_source(registry, tmp_path, COMPILED)
    out = tmp_path / "wheels"
    out.mkdir()
    with pytest.raises(DataError, match=r"^odd 1 has no wheel .*odd-1-cp3.*for machines like this"):
        fetch_wheel("odd", "1", "3.12", out)
    assert list(out.iterdir()) == []


def test_a_registry_that_does_not_answer_is_named(registry, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(DataError, match=r"^no package registry answers, and pip fetches"):
        fetch_wheel("engine", "2", "3.12", tmp_path)
    assert list(tmp_path.iterdir()) == [registry]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--python-version", "cp312"], "--python-version=cp312 is no version of Python 3: write"),
        (["--installed", "nowhere.txt"], "nowhere.txt cannot be read (No such file or directory)"),
    ],
)
def test_the_tool_refuses_in_one_sentence(tmp_path, options, message):
    tool = [sys.executable, str(REPO / "tools/gpu_proof.py"), "pack", "--out", str(tmp_path / "p")]
    done = subprocess.run([*tool, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_pack_that_did_not_arrive_whole_is_named(tmp_path):
    def expect(rule: str) -> Content:
        return lambda folder: {"expected": {"pytest": rule}}

    out = tmp_path / "pack"
    write_pack(out, [content("texts/a", "abc"), expect(">=1")], 10**6)
    check_pack(out)
    (out / "texts/a").write_text("abd")
    with pytest.raises(DataError, match="texts/a is not the file that was packed: pack again"):
        check_pack(out)
    (out / "texts/a").unlink()
    with pytest.raises(DataError, match="texts/a is not the file that was packed"):
        check_pack(out)
    write_pack(tmp_path / "other", [expect(">=99")], 10**6)
    with pytest.raises(DataError, match=r"pytest is \d\S* and has to be >=99: leave it out of"):
        check_pack(tmp_path / "other")
    with pytest.raises(DataError, match=r"manifest\.json"):
        check_pack(tmp_path)


def test_shards_travel_under_another_name(tmp_path):
    write_shards(tmp_path / "texts")
    out = tmp_path / "pack"
    write_pack(out, [copy_shards("crossover/train", tmp_path / "texts")], 10**6)
    for ending in ("bin", "idx", "json"):
        packed = (out / f"crossover/train.{ending}").read_bytes()
        assert packed == (tmp_path / f"texts.{ending}").read_bytes()
    with pytest.raises(DataError, match=r"nothing\.bin is missing: name shards"):
        copy_shards("crossover/train", tmp_path / "nothing")
