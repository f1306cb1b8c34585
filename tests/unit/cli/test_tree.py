"""The commands of `mdm` are there, their examples are valid, and asking for help costs little."""

from __future__ import annotations

import resource
import shlex
import subprocess
import sys

import pytest

from megatron_mdm.cli.tree import TREE, build_tree, main
from megatron_mdm.core.command_line import PROGRAM

ENTRIES = {name: entry for commands in TREE.values() for name, entry in commands.items()}
APP = build_tree()


def list_examples():
    for name, entry in ENTRIES.items():
        yield from ((name, example) for example in entry.examples)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_command_is_there_and_its_help_shows_an_example(name, capsys):
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Example:" in shown
    assert f"mdm {name}" in shown
    assert ENTRIES[name].summary[:40] in " ".join(shown.split())


@pytest.mark.parametrize(("name", "example"), list_examples())
def test_examples_are_valid_command_lines(name, example):
    words = shlex.split(example)
    assert words[:2] == ["mdm", name]
    APP.parse_args(words[1:], exit_on_error=False, print_error=False)


def test_the_help_imports_no_engine():
    code = (
        "import sys, runpy; sys.argv = ['mdm', '--help']\n"
        f"try: runpy.run_path({str(PROGRAM)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'pydantic', 'yaml', 'transformers'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "[]"


def test_the_help_comes_in_less_than_half_a_second():
    def spend():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, PROGRAM, "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Of the processor: other processes of the machine may be in the way. The least of several.
    assert min(spend() for _ in range(3)) < 0.5


def test_without_a_command_the_help_is_shown_and_the_version_names_the_engines(capsys):
    assert main([]) == 0
    assert "Usage: mdm COMMAND" in capsys.readouterr().out
    assert main(["--version"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("mdm ")
    assert "torch 2." in shown
    assert shown.endswith("\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("trian",), 'error: Unknown command "trian". Did you mean "train" (mdm --help lists'),
        (("train", "--confg=x"), "error: Unknown option: --confg=x. Did you mean --config"),
        (("sweep", "rnu", "x"), "(mdm sweep --help lists all options)."),
        (("fit",), "(mdm fit --help lists all options)."),
    ],
)
def test_what_is_not_known_is_said_in_one_sentence(words, sentence, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1


def test_it_runs_from_any_folder_without_being_installed(tmp_path):
    shown = subprocess.run(
        [sys.executable, "-I", PROGRAM, "fit", "no.csv"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 2
    assert shown.stderr.startswith("error: ")
    assert len(shown.stderr.splitlines()) == 1


def test_the_shell_completes_commands_and_options():
    script = build_tree().generate_completion(prog_name="mdm", shell="bash")
    for word in (*ENTRIES, "--dry-run", "to-hf", "--temperature"):
        assert word in script
