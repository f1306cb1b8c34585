"""Packs what a machine without a network lacks: wheels for its Python, and what others add.

A pack is a folder: `wheels/`, whatever else was written into it, and a manifest. Requirements are
read from the metadata of the packages that are installed here, in the versions that are installed
here; pip fetches the wheels.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.utils import parse_wheel_filename

from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.core.files import name_temporary, read_json, write_json_whole
from megatron_mdm.data.manifest import manifest_path
from megatron_mdm.data.shards import bin_path, idx_path
from megatron_mdm.studies.proof.requirements import (
    Closure,
    assume_torch,
    close_requirements,
    describe_target,
    read_installed,
    read_roots,
)
from megatron_mdm.studies.steps import REPO

MANIFEST = "manifest.json"
WHEELS = "wheels"
# What a pack may need on the way to a machine that takes 64 MiB with the repository.
MOST_MIB = 60
MOST_CHARACTERS = 2000

_FORMAT = "megatron_mdm proof pack"
# Of the C library: what systems since 2018 have. pip takes no older tags by itself.
_GLIBC_MINORS = range(28, 4, -1)
_PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in _GLIBC_MINORS),
    *(f"manylinux{year}_x86_64" for year in ("2014", "2010", "1")),
)
_SITE = "/tmp/proof-site"

# Writes into the folder that it is given, and returns what the manifest says of it.
Content = Callable[[Path], Mapping[str, Any]]


def pack(
    out: Path,
    installed: Path | None = None,
    python_version: str = "3.12",
    contents: Sequence[Content] = (),
    *,
    wheels: bool = True,
) -> str:
    """Makes a pack, whole or not at all.

    Args:
        out: The folder to make; a pack that stands there is replaced.
        installed: What the other machine has, as `pip list --format=freeze` prints it; names
            without versions are taken to fit. None: torch and what torch needs.
        python_version: Of the other machine.
        contents: What else belongs into the pack.
        wheels: False leaves them out, for a machine that has all packages.

    Returns:
        The command line that starts the proof on the other machine, in the repository's folder.

    Raises:
        MdmError: Something cannot be packed; nothing is left behind.
    """
    if not re.fullmatch(r"3\.\d+(\.\d+)?", python_version):
        raise ConfigError(
            f"--python-version={python_version} is no version of Python 3: write it as 3.12."
        )
    out = out.resolve()
    command = format_start(out, wheels=wheels)
    check_is_free(out)
    if not wheels:
        write_pack(out, contents, MOST_MIB * 2**20)
        return command
    environment = describe_target(python_version)
    there = assume_torch(environment) if installed is None else read_installed(installed)
    closure = close_requirements(read_roots(REPO / "requirements.txt"), there, environment)
    fetch = partial(pack_wheels, closure, python_version)
    write_pack(out, [fetch, *contents], MOST_MIB * 2**20)
    return command


def format_start(out: Path, *, wheels: bool = True) -> str:
    """Formats what to type on the other machine.

    Args:
        out: The pack, an absolute path. Within the repository it travels with it and is named
            relative to it.
        wheels: Has it any to install?

    Returns:
        One line.

    Raises:
        ConfigError: The line is too long.
    """
    folder = shlex.quote(str(out.relative_to(REPO) if out.is_relative_to(REPO) else out))
    command = f"python3 tools/gpu_proof.py run --pack {folder} --out proof"
    if wheels:
        command = (
            "python3 -m pip install --quiet --no-index --no-deps --upgrade --target "
            f"{_SITE} {folder}/{WHEELS}/*.whl && PYTHONPATH={_SITE} {command}"
        )
    if len(command) > MOST_CHARACTERS:
        raise ConfigError(
            f"--out is a path of {len(str(out))} characters, with which the command to start has "
            f"more than {MOST_CHARACTERS}: choose a shorter one."
        )
    return command


def check_is_free(out: Path) -> None:
    """Checks that a pack may be written somewhere.

    Args:
        out: Nothing, or a pack to replace.

    Raises:
        ConfigError: Something else stands there.
    """
    if not os.path.lexists(out):
        return
    try:
        is_pack = json.loads((out / MANIFEST).read_bytes())["format"] == _FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        is_pack = False
    if not is_pack:
        raise ConfigError(f"--out={out} exists and is no pack: choose another folder.")


def check_pack(folder: Path) -> None:
    """Checks that a pack arrived whole, and that this machine has what it takes for granted.

    Args:
        folder: The pack.

    Raises:
        DataError: A file is missing or not the one that was packed, or a package of this machine is
            missing or of a version that does not fit.
    """
    again = "pack again with tools/gpu_proof.py pack."
    manifest = read_json(folder / MANIFEST, again)
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise DataError(f"{folder / MANIFEST} is none of a pack: {again}")
    found = {one["name"]: one for one in _list_files(folder)}
    for one in manifest["files"]:
        if found.get(one["name"]) != one:
            raise DataError(f"{folder / one['name']} is not the file that was packed: {again}")
    for name, rule in manifest.get("expected", {}).items():
        version = _find_version(name)
        if version is None or not SpecifierSet(rule).contains(version, prereleases=True):
            raise DataError(
                f"{name} is {version or 'not installed'} and has to be {rule or 'there'}: leave it "
                "out of the file of --installed, and pack again."
            )


def copy_shards(name: str, prefix: Path) -> Content:
    """Packs shards.

    Args:
        name: Their prefix in the pack.
        prefix: Theirs here.

    Returns:
        What `pack` takes.

    Raises:
        DataError: They are not there.
    """
    files = [bin_path(prefix), idx_path(prefix), manifest_path(prefix)]
    for file in files:
        if not file.is_file():
            raise DataError(
                f"{file} is missing: name shards that mdm prepare wrote, by their prefix."
            )

    def write(folder: Path) -> dict[str, Any]:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copyfile(file, target.with_name(f"{target.name}{file.suffix}"))
        return {}

    return write


def pack_wheels(closure: Closure, python_version: str, folder: Path) -> dict[str, Any]:
    """Fetches wheels, the first content of every pack.

    Args:
        closure: Which.
        python_version: What for.
        folder: The pack.

    Returns:
        What the manifest says.

    Raises:
        DataError: One cannot be had.
    """
    (folder / WHEELS).mkdir()
    for name, version in sorted(closure.packed.items()):
        fetch_wheel(name, version, python_version, folder / WHEELS)
    return {
        "target": {"python_version": python_version, "platform": _PLATFORMS[0]},
        "packages": dict(sorted(closure.packed.items())),
        "expected": {name: str(spec) for name, spec in sorted(closure.expected.items())},
    }


def fetch_wheel(name: str, version: str, python_version: str, folder: Path) -> None:
    """Fetches a wheel, or builds it from source if that makes one for any machine.

    Args:
        name: The package.
        version: Which.
        python_version: What for.
        folder: Where to.

    Raises:
        DataError: No registry answers, there is neither wheel nor source, or the source compiles.
    """
    wanted = f"{name}=={version}"
    target = ["--python-version", python_version, "--implementation", "cp"]
    target += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        error = _run_pip("download", "--only-binary=:all:", *target, "--dest", fresh, wanted)
        # Some projects publish their source alone, DeepSpeed for one.
        is_built = error is not None
        if is_built:
            error = _run_pip("wheel", "--wheel-dir", fresh, wanted)
        if error is not None:
            raise DataError(
                f"{name} {version} has no wheel for Python {python_version} on x86-64 Linux and "
                f"none could be built here (pip: {error}): install another version here, or "
                "install it on the other machine and name it in the file of --installed."
            )
        (wheel,) = Path(fresh).iterdir()
        tags = {str(tag) for tag in parse_wheel_filename(wheel.name)[3]}
        if is_built and "py3-none-any" not in tags:
            raise DataError(
                f"{name} {version} has no wheel for Python {python_version} on x86-64 Linux, and "
                f"what pip makes of it here, {wheel.name}, is for machines like this one alone: "
                "install another version here, or install it on the other machine and name it in "
                "the file of --installed."
            )
        wheel.rename(folder / wheel.name)


def _run_pip(verb: str, *words: str) -> str | None:
    """Runs pip, and returns its error in one line, or None."""
    quietly = ("--quiet", "--no-deps", "--disable-pip-version-check", "--retries", "2")
    done = subprocess.run(
        [sys.executable, "-m", "pip", verb, *quietly, *words],
        # DeepSpeed's own setting: its kernels are compiled where they run.
        env=os.environ | {"DS_BUILD_OPS": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if any("Retrying (" in line for line in lines):
        raise DataError(
            "no package registry answers, and pip fetches the wheels from one: pack where pip can "
            "reach it."
        )
    return (errors or lines or ["no reason given"])[-1].rstrip(".")


def write_pack(out: Path, contents: Iterable[Content], most_bytes: int) -> None:
    """Writes a pack, whole or not at all.

    Args:
        out: The folder; a pack that stands there is replaced.
        contents: What is in it.
        most_bytes: The files' bytes together, at most.

    Raises:
        DataError: It is larger, or a content cannot be had.
    """
    temporary, replaced = name_temporary(out), out.with_name(f".{out.name}.{os.getpid()}.old")
    temporary.mkdir(parents=True)
    try:
        manifest: dict[str, Any] = {"format": _FORMAT}
        for write_content in contents:
            manifest |= write_content(temporary)
        manifest["files"] = list(_list_files(temporary))
        num_bytes = sum(one["bytes"] for one in manifest["files"])
        if num_bytes > most_bytes:
            largest = max(manifest["files"], key=lambda one: one["bytes"])
            raise DataError(
                f"the pack has {num_bytes / 2**20:.1f} MiB and may have {most_bytes / 2**20:g} "
                f"({largest['name']} has {largest['bytes'] / 2**20:.1f}): name what the other "
                "machine has already in the file of --installed."
            )
        write_json_whole(temporary / MANIFEST, manifest)
        if out.exists():
            out.rename(replaced)
        temporary.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _find_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _list_files(folder: Path) -> Iterator[dict[str, Any]]:
    manifest = folder / MANIFEST
    for path in sorted(one for one in folder.rglob("*") if one.is_file() and one != manifest):
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        name = path.relative_to(folder).as_posix()
        yield {"name": name, "bytes": path.stat().st_size, "sha256": digest}
