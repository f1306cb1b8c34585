from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.studies.proof.requirements import (
    LEFT_OUT,
    assume_torch,
    close_requirements,
    describe_target,
    read_installed,
    read_roots,
)

ROOT = Path(__file__).resolve().parents[3]
TARGET = describe_target("3.12")
# What a proof runs, imported where the packages that are left out cannot be found.
PROGRAM = """
import importlib, sys
from importlib.machinery import PathFinder
from pathlib import Path

absent, root = set(sys.argv[2:]), Path(sys.argv[1])

class WithoutThem(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        found = None if name.partition(".")[0] in absent else super().find_spec(name, path, target)
        return found

sys.meta_path = [WithoutThem if one is PathFinder else one for one in sys.meta_path]
rooms = "core config data diffusion model distributed checkpoint reporting training corpus"
rooms = [*rooms.split(), "hf/conversion", "hf/formats", "studies/benchmarks", "studies/proof"]
files = [path for room in rooms for path in (root / "megatron_mdm" / room).glob("*.py")]
files += [root / f"megatron_mdm/hf/{name}.py" for name in ("export", "from_run")]
files += [*(root / "megatron_mdm/inference").glob("*.py")]
for path in files:
    importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
print(len(files))
"""


@pytest.fixture
def install(tmp_path):
    """Makes the metadata of an installed package; returns where."""

    def add(name: str, version: str, *requires: str) -> list[str]:
        folder = tmp_path / "site" / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {one}" for one in requires]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        return [str(folder.parent)]

    return add


def test_requirements_are_followed_until_the_other_machine_has_them(install):
    install("engine", "2.1", "Left.Pad >=1", "numbers>=2,<4", "torch>=2")
    install("left-pad", "1.3", "engine", "tables", "old>=3")
    # Not followed: who has tables has what tables need.
    install("tables", "9", "nowhere")
    paths = install("old", "3.2")
    there = {
        "torch": None,
        "numbers": Version("3.0rc1"),
        "tables": Version("1"),
        "old": Version("2"),
    }
    closure = close_requirements(["engine"], there, TARGET, paths)
    assert closure.packed == {"engine": "2.1", "left-pad": "1.3", "old": "3.2"}
    expected = {name: str(specifier) for name, specifier in closure.expected.items()}
    assert expected == {"numbers": "<4,>=2", "tables": "", "torch": ">=2"}


def test_what_one_requirement_refuses_is_packed_for_all(install):
    install("engine", "1", "numbers>=1", "plots")
    install("plots", "1", "numbers>=5")
    paths = install("numbers", "5.5")
    closure = close_requirements(["engine"], {"numbers": Version("4")}, TARGET, paths)
    assert closure.packed == {"engine": "1", "plots": "1", "numbers": "5.5"}
    assert closure.expected == {}


@pytest.mark.parametrize(
    ("python_version", "found"),
    [
        ("3.11", {"engine", "old-python", "linux", "fast", "faster"}),
        ("3.12", {"engine", "linux", "fast", "faster"}),
        ("3.12.4", {"engine", "linux", "fast", "faster", "patched"}),
    ],
)
def test_markers_are_of_the_other_machine(install, python_version, found):
    install(
        "engine",
        "1",
        "old-python; python_version < '3.12'",
        "patched; python_full_version >= '3.12.3'",
        "linux; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "windows; os_name == 'nt'",
        "pypy; implementation_name == 'pypy'",
        "fast[more]",
        "tests; extra == 'test'",
    )
    install("fast", "1", "faster; extra == 'more'", "slow; extra == 'less'")
    for name in ("old-python", "patched", "linux", "windows", "pypy", "tests", "slow"):
        install(name, "1")
    paths = install("faster", "1")
    closure = close_requirements(["engine"], {}, describe_target(python_version), paths)
    assert closure.packed.keys() == found


def test_who_has_torch_has_what_torch_needs(install):
    install("torch", "2.0", "numbers", "windows; sys_platform == 'win32'")
    paths = install("numbers", "1", "letters")
    install("letters", "1")
    assert assume_torch(TARGET, paths) == {"torch": None, "numbers": None, "letters": None}


def test_a_package_that_is_not_here_has_no_version(install):
    paths = install("engine", "1", "nowhere")
    with pytest.raises(ConfigError, match=r"^nowhere is needed on the other machine and not inst"):
        close_requirements(["engine"], {}, TARGET, paths)


def test_what_pip_prints_and_bare_names_are_read(tmp_path):
    file = tmp_path / "there.txt"
    file.write_text("torch==2.11.0+cu130\n\n# by hand\nPy_Yaml\nlocal.one @ file:///wheels/x.whl\n")
    found = {"torch": Version("2.11.0+cu130"), "py-yaml": None, "local-one": None}
    assert read_installed(file) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torch==2\nPackage Version\n", r"^line 2 of .*there.txt is 'Package Version', neither"),
        ("torch==two\n", r"^line 1 of .*there.txt is 'torch==two', neither"),
        ("numpy==2.5.2\n", r"there.txt names no torch, which is never packed"),
        (None, r"there.txt cannot be read \(No such file or directory\)"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "there.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_installed(tmp_path / "there.txt")


def test_the_projects_own_requirements_are_met_or_left_out():
    # Each by the packages that are packed, as their metadata says, or not at all.
    roots = read_roots(ROOT / "requirements.txt")
    closure = close_requirements(roots, {"torch": None}, TARGET)
    assert {"deepspeed", "megatron-core", "cyclopts", "pydantic-core"} <= closure.packed.keys()
    assert not LEFT_OUT & closure.packed.keys()
    assert closure.expected.keys() == {"torch"}


def test_a_proof_runs_without_what_is_left_out():
    absent = [name.replace("-", "_") for name in LEFT_OUT]
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(ROOT), *absent]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    # Engines print too.
    assert int(done.stdout.split()[-1]) > 150
