"""A browser for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import chromium
import pytest


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[chromium.Page]:
    program = chromium.find_program()
    if program is None:
        pytest.skip("there is no chromium here to open pages with")
    with chromium.chromium_page(program, tmp_path_factory.mktemp("profile")) as page:
        yield page
