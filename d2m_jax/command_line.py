"""What the root scripts share: config files, options, and errors told in one line."""

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from d2m_jax.config import ConfigError, at_path, check, suggestion

T = TypeVar("T")
NO_BACKEND = (
    "Unable to initialize backend"  # JAX, of a platform that is not there or does not start
)


def run(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """The exit code of main(arguments): 2 after one line for a ConfigError or where JAX cannot
    start, 130 if interrupted."""
    # Where a file is damaged, Orbax and its tasks would tell so beside our one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    before = sys.unraisablehook
    sys.unraisablehook = lambda told: _is_orbax(told.exc_value) or before(told)
    try:
        _check_environment()
        main(arguments)
    except (ConfigError, RuntimeError) as error:
        if not isinstance(error, ConfigError) and not str(error).startswith(NO_BACKEND):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        sys.unraisablehook = before
    return 0


def _check_environment() -> None:
    """ConfigError for a variable of JAX's, which reads them when it is imported."""
    if any(name.startswith("JAX_") for name in os.environ):
        try:
            importlib.import_module("jax")
        except ValueError as error:
            raise ConfigError(f"a JAX_ variable of the environment: {error}") from None


def _is_orbax(error: BaseException | None) -> bool:
    """Whether it is what becomes of Orbax's other writes where one failed, of a full disk say."""
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def load_config(path: str | Path) -> Any:
    """The value of get_config() in a Python file; a ConfigError names file and line at fault."""
    path = Path(path)
    check(path.is_file(), f"{path}: no such file, expected a Python file with get_config()")
    check(path.suffix == ".py", f"{path}: expected a Python file with get_config()")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        check(hasattr(module, "get_config"), "expected a function get_config(), found none")
        return module.get_config()
    except Exception as error:  # whatever a user's file does wrong
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        what = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path}{f', line {line}' if line else ''}: {what}") from error


def parse(
    kind: type[T],
    arguments: Sequence[str],
    *,
    usage: str,
    description: str,
    default: T | None = None,
) -> T:
    """Arguments as a dataclass, by tyro: a field is `--field`, one of an inner dataclass `--a.b`.

    `--help` prints them all and exits. Raises ConfigError where tyro would draw a box.
    """
    given: dict[str, Any] = {} if default is None else {"default": default}

    def cli(arguments: Sequence[str]):
        return tyro.cli(
            kind,
            args=list(arguments),
            prog=usage,
            description=description,
            return_unknown_args=True,
            use_underscores=True,
            config=(tyro.conf.AvoidSubcommands,),
            **given,
        )

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed, unknown = cli(arguments)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_message(said.getvalue())) from None
    if unknown:
        options = io.StringIO()
        with contextlib.redirect_stdout(options), contextlib.suppress(SystemExit):
            cli(["--help"])
        name = unknown[0].split("=")[0]
        known = re.findall(r"--[\w.]+", options.getvalue())
        raise ConfigError(f"{name}: unknown option{suggestion(name, known)}")
    return parsed


def _message(box: str) -> str:
    """What a box of tyro's says, without frame, title and hints."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if set(line) <= set("─╰╯")), len(lines))
    said = re.sub(r"^Error parsing (config\.)?", "", " ".join(lines[:end]))
    # Of a config's own check tyro tells the path, and the check the name of its class.
    path, _, rest = said.partition(": ")
    return at_path(rest, path) if re.match(r"\w+Config[.:]", rest) else said
