"""Both recipes of containers install the same, from the versions that were tested together."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parents[2]
FOLDER = REPO / "tools/containers"
DOCKER = (FOLDER / "Dockerfile").read_text()
APPTAINER = (FOLDER / "megatron_mdm.def").read_text()


def requirements(file: str) -> dict[str, Requirement]:
    lines = (REPO / file).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and line[0] not in "#-"]
    return {canonicalize_name(one.name): one for one in found}


def test_both_recipes_begin_alike_and_install_by_one_script():
    (base,) = re.findall(r"^ARG BASE=(.*)", DOCKER, re.MULTILINE)
    assert re.findall(r"^ +BASE=(.*)", APPTAINER, re.MULTILINE) == [base]
    packages = re.compile(r"apt-get install .*?(?=[;\\\n])")
    assert {*map(str.strip, packages.findall(DOCKER))} == {*packages.findall(APPTAINER)}
    call = "/tmp/source/tools/containers/install.sh /opt/megatron_mdm/bin/python "
    assert f'RUN {call}"${{TORCH_INDEX}}"' in DOCKER
    assert f'    {call}"{{{{ TORCH_INDEX }}}}"' in APPTAINER
    # Versions stand in requirements.txt and constraints.txt alone.
    assert not re.search(r"==\d", DOCKER + APPTAINER + (FOLDER / "install.sh").read_text())


def test_both_recipes_copy_the_same_files():
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    section = APPTAINER.partition("%files\n")[2].partition("\n\n")[0]
    copied = [line.split() for line in section.splitlines()]
    assert [source for source, _ in copied] == [line[1:] for line in ignored if line[0] == "!"]
    for source, target in copied:
        assert target == f"/tmp/source/{source}"
        assert (REPO / source).exists()


def test_the_base_has_a_python_that_the_package_allows():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    (version,) = re.findall(r"BASE=python:([\d.]+)-", DOCKER)
    assert version in SpecifierSet(project["requires-python"])


def test_what_was_tested_together_is_what_the_package_allows():
    pins = requirements("constraints.txt")
    for name, allowed in requirements("requirements.txt").items():
        (pin,) = pins[name].specifier
        assert pin.operator == "=="
        assert pin.version in allowed.specifier, f"{allowed} and {pins[name]}"
