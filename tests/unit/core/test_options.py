from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.options import FLATTENED, run_command


@FLATTENED
@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.

    Attributes:
        runs: Folders of runs.
        kind: What is learned.
    """

    runs: list[Path]
    kind: Literal["ar", "mdm"] = "mdm"
    lr: float = 1e-3
    is_quick: bool = False


def train(*overrides: str, settings: Settings):
    """Trains."""
    return settings, overrides


def test_fields_of_a_dataclass_are_options_and_positions_may_stand_between_them():
    line = ["a.b=1", "--runs", "x", "y", "--is-quick", "--lr", "2"]
    settings, overrides = run_command(train, "Trains.", line)
    assert settings == Settings(runs=[Path("x"), Path("y")], lr=2.0, is_quick=True)
    assert overrides == ("a.b=1",)


def test_of_an_option_that_is_given_twice_the_last_counts_and_lists_grow():
    line = ["--runs", "x", "--lr", "2", "--runs", "y", "--lr", "3"]
    settings, _ = run_command(train, "Trains.", line)
    assert settings == Settings(runs=[Path("x"), Path("y")], lr=3.0)


def test_subcommands_return_what_their_functions_do():
    assert run_command({"count": lambda *, number=1: number + 1}, "", ["count"]) == 2


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (["--runs", "x", "--kind", "arr"], ["--kind", "arr", '"ar"', '"mdm"']),
        (["--runs", "x", "--lr", "fast"], ["--lr", "fast"]),
        (["--runs", "x", "--knd", "ar"], ["--knd", "--kind"]),
        (["--kind", "ar"], ["--runs"]),
    ],
)
def test_a_wrong_command_line_is_one_sentence_with_option_value_and_remedy(line, parts):
    with pytest.raises(ConfigError) as caught:
        run_command(train, "Trains.", line)
    for part in [*parts, "--help"]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_is_plain_text_with_defaults(capsys):
    assert run_command(train, "Trains a model.", ["--help"]) is None
    shown = capsys.readouterr().out
    for part in ("Trains a model.", "--runs", "Folders of runs.", "What is learned.", "0.001"):
        assert part in shown


def test_an_interruption_reaches_whoever_called():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_command(interrupt, "", [])
