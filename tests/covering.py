"""What `make test` runs of the tests that need minutes; `--all` (`make test-all`) runs everything.

`--slow` (`make test-slow`) stands between them.

Of tests with many cases that start ranks, a covering set: of each test its first case, and in each
file every word of the names of cases (`tp2-sp-zero1-fp32` has four) at least once. Tests marked
`slow` are left out without `--slow`.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

# Folders whose cases take seconds each.
_THINNED = {"distributed", "extension", "golden"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="all cases, also of slow tests")
    parser.addoption("--slow", action="store_true", help="slow tests too, a covering set of cases")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Who names files or words wants what they name.
    is_named = config.option.keyword or any(".py" in one for one in config.args)
    if config.getoption("--all") or is_named:
        return
    with_slow = config.getoption("--slow")
    kept = cover(item for item in items if with_slow or not item.get_closest_marker("slow"))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def cover(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Chooses what is run without `--all`.

    Args:
        items: Tests.

    Returns:
        Those that stand for all of them.
    """
    kept: set[pytest.Item] = set()
    functions: set[str] = set()
    seen: set[tuple[str, str]] = set()
    for item in items:
        function, _, case = item.nodeid.partition("[")
        words = {(item.path.as_posix(), word) for word in case.rstrip("]").split("-")}
        is_cheap = item.path.parent.name not in _THINNED
        if is_cheap or function not in functions or not words <= seen:
            kept.add(item)
            functions.add(function)
            seen |= words
    return kept
