"""constraints.txt names a version of all that is required, and one that the requirement allows."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parents[2]


def read(name):
    lines = (REPO / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_the_versions_tested_together_are_versions_that_are_allowed(name):
    pinned = {}
    for one in read("constraints.txt"):
        (specifier,) = one.specifier
        assert specifier.operator == "=="
        pinned[canonicalize_name(one.name)] = specifier.version
    for required in read(name):
        assert required.specifier.contains(pinned[canonicalize_name(required.name)]), required
