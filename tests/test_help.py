"""`--help` of every command shows an example, and the command takes what the example says."""

import argparse
import ast
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from d2m_jax import command_line
from d2m_jax.commands import evaluate

ROOT = Path(__file__).parent.parent
NAMES = {"convert": "convert_torch_weights"}  # of the root scripts: other than the commands'
COMMANDS = {
    **{
        f"python {NAMES.get(file.stem, file.stem)}.py": f"d2m_jax.commands.{file.stem}"
        for file in (ROOT / "d2m_jax/commands").glob("[!_]*.py")
    },
    **{
        f"python -m {name}": name
        for file in (ROOT / "d2m_jax").rglob("*.py")
        if "__main__" in file.read_text()
        for name in [".".join(file.relative_to(ROOT).with_suffix("").parts)]
    },
}
HELP = [
    *((command, []) for command in COMMANDS),
    *(("python evaluate.py", [name]) for name in evaluate.COMMANDS),
    ("python train.py", ["tiny"]),
    ("python -m d2m_jax.data.cache", ["examples/emoji/teacher.py"]),
]
SCRIPTS = [
    file
    for folder in ("benchmarks", "examples")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if "__main__" in file.read_text()
]


class ParsedError(Exception):
    """The arguments are right; what the command would do now is not done."""


def only(parse):
    """A function that parses arguments, made to end there."""

    def parsed(*arguments, **options):
        parse(*arguments, **options)
        raise ParsedError

    return parsed


def test_all_commands_are_known():
    assert len(COMMANDS) >= 9 and "python -m d2m_jax.training.status" in COMMANDS


@pytest.mark.parametrize("command, given", HELP, ids=lambda part: "".join(part)[-30:])
def test_help_shows_an_example(command, given, capsys, monkeypatch):
    main = importlib.import_module(COMMANDS[command]).main
    monkeypatch.chdir(ROOT)
    try:
        main([*given, "--help"])
    except SystemExit as stopped:
        assert not stopped.code
    said = capsys.readouterr().out
    found = re.search(r"^Example: (.*?)(\n *\n|\Z)", said, re.MULTILINE | re.DOTALL)
    assert found, said
    example = " ".join(found[1].split())
    assert example.startswith(" ".join([command, *given])), example
    monkeypatch.setattr(command_line, "parse", only(command_line.parse))
    with pytest.raises(ParsedError):
        main(shlex.split(example.removeprefix(command)))


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_help_of_a_script_shows_its_command(file, capsys, monkeypatch):
    command = f"python {file.relative_to(ROOT)}"
    doc = ast.get_docstring(ast.parse(file.read_text())) or ""
    examples = re.findall(rf"^    {re.escape(command)}(.*)$", doc, re.MULTILINE)
    assert examples
    monkeypatch.syspath_prepend(str(file.parent))

    def run(arguments):
        monkeypatch.setattr(sys, "argv", [str(file), *arguments])
        try:
            runpy.run_path(str(file), run_name="__main__")
        except ModuleNotFoundError as error:
            pytest.skip(f"needs {error.name}")

    with pytest.raises(SystemExit):
        run(["--help"])
    said = capsys.readouterr().out
    monkeypatch.setattr(
        argparse.ArgumentParser, "parse_args", only(argparse.ArgumentParser.parse_args)
    )
    for example in examples:
        assert f"    {command}{example}\n" in said
        with pytest.raises(ParsedError):
            run(shlex.split(example))
