"""Command lines from the signature of a function: its parameters, or the fields of a dataclass.

A tool is a function. What it takes by keyword are options, `--learning-rate` for `learning_rate`;
types, defaults and choices come from the annotations, help from the docstrings.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, validators

from megatron_mdm.core.errors import ConfigError

Command = Callable[..., Any]

# A dataclass whose fields are options of their own. Of an option that is given twice the last value
# counts, or all values where there may be several; a truth value is true where its option is named.
FLATTENED = Parameter(name="*")
# A field of such a dataclass that is no option; an option that has a --no-... beside it.
NO_OPTION = Parameter(parse=False, show=False)
YES_OR_NO = Parameter(negative=None)
# An option that is given again for each of its values, so that positional arguments may follow it.
REPEATED = Parameter(consume_multiple=False)
# Positional arguments that may look like options: they are for another program.
FOREIGN = Parameter(allow_leading_hyphen=True)
Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]
_OPTIONS = Parameter(negative=(), consume_multiple=True, allow_repeating=True)


def option_name(name: str) -> str:
    """The option of a parameter or field, such as `--learning-rate`."""
    return "--" + name.replace("_", "-")


def check_at_least(settings: Any, **least: float) -> None:
    """Checks numbers of a dataclass of options, also those in tuples.

    Args:
        settings: The options. Its whole numbers have to be 1 or more.
        **least: The least value of a field, where that is another one or the field no whole number.

    Raises:
        ConfigError: A value is less.
    """
    for field in fields(settings):
        given = getattr(settings, field.name)
        for value in given if isinstance(given, tuple) else (given,):
            # Someone may write 1 where 1.0 is meant, and True is a whole number to Python.
            is_count = type(value) is int and "float" not in str(field.type)
            lowest = least.get(field.name, 1 if is_count else None)
            if lowest is not None and value is not None and not value >= lowest:
                raise ConfigError(
                    f"{option_name(field.name)}={value:g} has to be at least {lowest:g}: use a "
                    "larger number."
                )


def make_app(
    command: Command | Mapping[str, Command] | None,
    description: str | None,
    *,
    name: str | None = None,
    examples: Sequence[str] = (),
    finish: Callable[[Any], Any] | None = None,
    version: Callable[[], str] | None = None,
) -> App:
    """Makes the command line of a function, or of several by name.

    Args:
        command: The tool's function, or its subcommands by name; None: they are added afterwards. A
            dataclass that is annotated with `FLATTENED` stands for its fields.
        description: First lines of the help.
        name: What the help calls it; None: the file that was started.
        examples: Last lines of the help.
        finish: Gets what the function returned.
        version: What --version says; None: there is no such option.

    Returns:
        What `run_app` runs.
    """
    app = App(
        name=name or Path(sys.argv[0]).name,
        help=description or "",
        help_format="plaintext",
        help_epilogue=format_examples(examples),
        version=version or "",
        version_flags=() if version is None else ("--version",),
        default_parameter=_OPTIONS,
        result_action=finish or "return_value",
        # Entry points say that they were interrupted, and jobs save on the way out.
        suppress_keyboard_interrupt=False,
    )
    if isinstance(command, Mapping):
        for one, function in command.items():
            app.command(function, name=one)
    elif command is not None:
        app.default(command)
    return app


def format_examples(examples: Sequence[str]) -> str | None:
    """The last lines of a help.

    Args:
        examples: Command lines.

    Returns:
        The lines; None without examples.
    """
    return "\n".join(("Example:", *(f"  {one}" for one in examples))) if examples else None


def run_app(app: App, arguments: Sequence[str] | None = None) -> Any:
    """Reads a command line and calls what it asks for.

    Args:
        app: From `make_app`.
        arguments: The command line; None: the process's.

    Returns:
        What the function returns; None where help was asked for.

    Raises:
        ConfigError: An option is unknown, missing or has a value that is not valid.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return app(given, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        # A long list of what there is stands in the help.
        sentence = " ".join(str(error).split()).partition(" Available commands")[0].rstrip(".?")
        if isinstance(error, MissingArgumentError) and error.argument is not None:
            name = error.argument.name
            sentence = f"{name} has no value" if name in given else f"{name} is missing"
        where = " ".join((*app.name, *(error.command_chain or ()), "--help"))
        raise ConfigError(f"{sentence} ({where} lists all options).") from None


def run_command(
    command: Command | Mapping[str, Command],
    description: str | None,
    arguments: Sequence[str] | None = None,
) -> Any:
    """Reads a command line and calls what it asks for, as `make_app` and `run_app` do."""
    return run_app(make_app(command, description), arguments)
