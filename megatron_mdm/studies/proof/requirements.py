"""What a machine lacks of what a proof run needs, from the metadata of what is installed here."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_mdm.core.errors import ConfigError, DataError, unreadable_error

# Of requirements.txt: nothing that a proof runs imports these, and their requirements are many.
LEFT_OUT = frozenset({"datasets", "lm-eval", "math-verify", "wandb"})

_TORCH = "torch"


@dataclass(frozen=True)
class Closure:
    """What a set of requirements comes to.

    Attributes:
        packed: Versions to pack, by canonical name.
        expected: What the other machine's own packages have to be, by canonical name.
    """

    packed: dict[str, str] = field(default_factory=dict)
    expected: dict[str, SpecifierSet] = field(default_factory=dict)


def describe_target(python_version: str) -> dict[str, str]:
    """Describes the other machine as requirements ask for it.

    Args:
        python_version: Such as 3.12.

    Returns:
        The variables of environment markers.
    """
    parts = python_version.split(".")
    full = python_version if len(parts) > 2 else f"{python_version}.0"
    return {
        "implementation_name": "cpython",
        "implementation_version": full,
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": full,
        "python_version": ".".join(parts[:2]),
        "sys_platform": "linux",
    }


def read_roots(path: Path) -> list[str]:
    """Reads the requirements that a proof has of its own.

    Args:
        path: The project's requirements.txt.

    Returns:
        Requirements, apart from torch, which is the other machine's, and `LEFT_OUT`.
    """
    lines = [line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines()]
    names = {line: canonicalize_name(Requirement(line).name) for line in lines if line}
    return [line for line, name in names.items() if name not in {_TORCH, *LEFT_OUT}]


def read_installed(path: Path) -> dict[str, Version | None]:
    """Reads what another machine has.

    Args:
        path: Lines of `pip list --format=freeze`, or of names.

    Returns:
        Versions by canonical name, None where not given.

    Raises:
        DataError: The file cannot be read, has a line that is neither, or names no torch.
    """
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise unreadable_error(path, error) from None
    found: dict[str, Version | None] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            one = Requirement(text)
            versions = [Version(pin.version) for pin in one.specifier if pin.operator == "=="]
        except ValueError:
            raise DataError(
                f"line {number} of {path} is {text!r}, neither name==version nor a name: give "
                "what `pip list --format=freeze` prints there."
            ) from None
        found[canonicalize_name(one.name)] = versions[0] if versions else None
    if _TORCH not in found:
        raise DataError(f"{path} names no torch, which is never packed: install it there first.")
    return found


def assume_torch(
    environment: Mapping[str, str], paths: Sequence[str] | None = None
) -> dict[str, Version | None]:
    """What a machine has that has torch.

    Args:
        environment: Of `describe_target`.
        paths: Where packages are installed here; None: where Python looks.

    Returns:
        torch and what it needs, as of `read_installed`.
    """
    return dict.fromkeys(close_requirements([_TORCH], {}, environment, paths).packed)


def close_requirements(
    roots: Iterable[str],
    installed: Mapping[str, Version | None],
    environment: Mapping[str, str],
    paths: Sequence[str] | None = None,
) -> Closure:
    """Follows requirements until each is met, by the other machine's package or by a packed one.

    Of a package that is there already its own requirements are there too.

    Args:
        roots: Requirements.
        installed: What is there, as of `read_installed`.
        environment: Of `describe_target`.
        paths: Where packages are installed here; None: where Python looks.

    Returns:
        What to pack, in versions installed here, and what is expected.

    Raises:
        ConfigError: A package is not installed here either.
    """
    closure = Closure()
    waiting = list(_apply_markers(roots, (), environment))
    seen = set()
    while waiting:
        one = waiting.pop()
        name, extras = str(canonicalize_name(one.name)), frozenset(one.extras)
        version = installed.get(name)
        if name in installed and (
            version is None or one.specifier.contains(version, prereleases=True)
        ):
            closure.expected[name] = closure.expected.get(name, SpecifierSet()) & one.specifier
        elif (name, extras) not in seen:
            seen.add((name, extras))
            distribution = _find_distribution(name, paths)
            closure.packed[name] = distribution.version
            waiting += _apply_markers(distribution.requires or (), extras, environment)
    for name in closure.packed.keys() & closure.expected.keys():
        del closure.expected[name]
    return closure


def _apply_markers(
    requirements: Iterable[str], extras: Iterable[str], environment: Mapping[str, str]
) -> Iterator[Requirement]:
    for text in requirements:
        one = Requirement(text)
        asked = [dict(environment, extra=extra) for extra in ("", *extras)]
        if one.marker is None or any(map(one.marker.evaluate, asked)):
            yield one


def _find_distribution(name: str, paths: Sequence[str] | None) -> metadata.Distribution:
    where = list(sys.path if paths is None else paths)
    for distribution in metadata.Distribution.discover(name=name, path=where):
        return distribution
    raise ConfigError(
        f"{name} is needed on the other machine and not installed here, so its version is not "
        "known: run make setup."
    )
