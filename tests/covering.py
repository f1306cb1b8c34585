"""What `make test` runs of the tests that need minutes; `--all` (`make test-all`) runs everything.

Of a test with many cases that starts ranks, a covering set: every value of each of its parameters
at least once. Tests marked `slow` are left out.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

# Folders whose cases take seconds each.
_THINNED = {"distributed", "golden"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="all cases, also of slow tests")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Who names files or words wants what they name.
    is_named = config.option.keyword or any(".py" in one for one in config.args)
    if config.getoption("--all") or is_named:
        return
    kept = cover(items)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def cover(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Chooses what is run without `--all`.

    Args:
        items: All tests.

    Returns:
        Those that stand for all.
    """
    kept: set[pytest.Item] = set()
    seen: set[tuple[str, str, str]] = set()
    for item in items:
        if item.get_closest_marker("slow"):
            continue
        spec = getattr(item, "callspec", None)
        if spec is None or item.path.parent.name not in _THINNED:
            kept.add(item)
            continue
        function = item.nodeid.split("[", 1)[0]
        values = {(function, name, repr(value)) for name, value in spec.params.items()}
        if not values <= seen:
            kept.add(item)
            seen |= values
    return kept
