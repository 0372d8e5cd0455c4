"""What the root scripts share: config files, options, and errors told in one line."""

import contextlib
import dataclasses
import errno
import importlib
import importlib.util
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from d2m_jax import environment  # noqa: F401 (before what it looks for)

# isort: split
import tyro

from d2m_jax import config
from d2m_jax.config import ConfigError, at_path, check, suggestion

T = TypeVar("T")
NO_BACKEND = (
    "Unable to initialize backend"  # JAX, of a platform that is not there or does not start
)

# Of a file or folder that a user named.
UNREADABLE = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)


@dataclasses.dataclass(frozen=True)
class Among:
    """Of many processes, where the environment does not tell (SLURM, Open MPI and TPU pods do)."""

    coordinator: str | None = None  # HOST:PORT of process 0
    processes: int | None = None  # how many there are
    process: int | None = None  # number of this one
    host_timeout: float = 300.0  # seconds that all may take to come

    @property
    def who(self) -> tuple[str | None, int | None, int | None, float]:
        """What hosts.joined is given."""
        return self.coordinator, self.processes, self.process, self.host_timeout


AmongProcesses = Annotated[Among, tyro.conf.arg(name="")]  # --coordinator, without --among


def run(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """The exit code of main(arguments): 2 after one line for a ConfigError, for a file that cannot
    be read or where JAX cannot start, 130 if interrupted, 141 if what it prints has no reader any
    more."""
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
    except BrokenPipeError:
        if not _nobody_reads("\n"):  # but of another connection
            raise
        return 141  # as shells count what SIGPIPE ends
    except OSError as error:
        if error.errno not in UNREADABLE or not isinstance(error.filename, str):
            raise
        print(f"error: {error.filename[:200]}: {error.strerror}", file=sys.stderr)
        return 2
    finally:
        _nobody_reads()
        sys.unraisablehook = before
    return 0


def launched(program: str) -> str:
    """What is typed to run a program: a script of Python's, or one that is installed."""
    return f"python {program}" if program.split()[0].endswith(".py") else program


def with_example(description: str, program: str, example: str) -> str:
    """What --help says: the description, then a command that can be typed as it stands."""
    return f"{description.strip()}\n\nExample: {launched(program)} {example}"


def _nobody_reads(more: str = "") -> bool:
    """Whether the reader of what is printed has gone, as in `train.py --help | head -1`; then
    neither we nor Python, which prints the rest at its end, say more."""
    try:
        print(more, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


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


def config_file(path: str | Path) -> Path:
    """The file of a config, given by its path or, of one that comes with the package, its name."""
    named = Path("configs") / f"{path}.py"
    by_name = re.fullmatch(r"\w+", str(path)) is not None and not Path(path).is_file()
    return config.shipped(named if by_name and config.shipped(named).is_file() else path)


def load_config(path: str | Path) -> Any:
    """The value of get_config() in a Python file, or in that of this name among those that come
    with the package; a ConfigError names file and line at fault."""
    given, path = path, config_file(path)
    known = sorted(file.stem for file in (config.SHIPPED / "configs").glob("*.py"))
    near = suggestion(Path(given).stem, known)
    check(path.is_file(), f"{given}: no such file, expected a Python file with get_config(){near}")
    check(path.suffix == ".py", f"{path}: expected a Python file with get_config()")
    # A config may be made of another: from configs.icons_moe_s import get_config.
    if str(config.SHIPPED) not in sys.path:
        sys.path.append(str(config.SHIPPED))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        check(hasattr(module, "get_config"), "expected a function get_config(), found none")
        return module.get_config()
    except Exception as error:  # whatever a user's file does wrong
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        raise ConfigError(f"{path}{f', line {line}' if line else ''}: {_told(error)}") from error


def load_run(path: str | Path) -> config.RunConfig:
    """The config of a run with a teacher that `load_config` finds; ConfigError for another one."""
    found = load_config(path)
    fits = isinstance(found, config.RunConfig) and found.teacher is not None
    check(fits, f"{path}: expected a RunConfig with a teacher")
    return found


def _told(error: Exception) -> str:
    """What went wrong in a config file."""
    if isinstance(error, ConfigError):
        return str(error)
    # What Python says of a config's fields that are unknown, or that were left out.
    said = re.match(r"(\w+)\.__init__\(\) (got an unexpected|missing).*?'(\w+)'", str(error))
    kind = getattr(config, said[1], None) if said else None
    if said is None or kind is None or not isinstance(error, TypeError):
        return f"{type(error).__name__}: {error}"
    known = [field.name for field in dataclasses.fields(kind)]
    near = f"unknown field{suggestion(said[3], known)}"
    return f"{said[1]}.{said[3]}: {'missing' if said[2] == 'missing' else near}"


def parse(
    kind: type[T],
    arguments: Sequence[str],
    *,
    usage: str,
    description: str,
    example: str,
    default: T | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> T:
    """Arguments as a dataclass, by tyro: a field is `--field`, one of an inner dataclass `--a.b`.

    `--help` prints the description, `example` (arguments that can follow `usage`) and all options,
    and exits. Raises ConfigError where tyro would draw a box, which says
    of options in `elsewhere`, that others have, what to do.
    """
    given: dict[str, Any] = {} if default is None else {"default": default}

    def cli(arguments: Sequence[str]):
        return tyro.cli(
            kind,
            args=list(arguments),
            prog=usage,
            description=with_example(description, usage, example),
            return_unknown_args=True,
            use_underscores=True,
            config=(tyro.conf.AvoidSubcommands,),
            **given,
        )

    def usage_of(name: str) -> str:
        """The line of --help on an option, `--seed INT`; all of the help for ""."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            cli(["--help"])
        found = re.search(rf"{re.escape(name)} (.*?)(  |│|\n)", said.getvalue()) if name else None
        return found[1] if found else said.getvalue()

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed, unknown = cli(arguments)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_plain(_message(said.getvalue()), usage_of)) from None
    if unknown:
        name = unknown[0].split("=")[0]
        plain = "one that is True or False takes no value: --NAME, --no_NAME"
        check(
            name.startswith("-"),
            f"{name}: no option takes it; a value stands behind its option; {plain}",
        )
        known = re.findall(r"--[\w.]*\w(?![\w.])", usage_of(""))
        there = (elsewhere or {}).get(name)
        hint = f"; {there}" if there else suggestion(name, known)
        raise ConfigError(f"{name}: unknown option{hint}")
    return parsed


def _message(box: str) -> str:
    """What a box of tyro's says, without frame, title and hints."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if set(line) <= set("─╰╯")), len(lines))
    said = re.sub(r"^Error parsing (config\.)?", "", " ".join(lines[:end]))
    # Of a config's own check tyro tells the path, and the check the name of its class.
    path, _, rest = said.partition(": ")
    return at_path(rest, path) if re.match(r"\w+Config[.:]", rest) else said


def _plain(said: str, usage_of: Callable[[str], str]) -> str:
    """tyro's and Python's words for a value that cannot be read: option, found, expected."""
    if found := re.match(r"Missing from (.*?): ", said):
        needed = re.findall(r"(?:^|\(required\)) ?(--[\w.]+|\S+)", said[found.end() :])
        return f"{', '.join(needed)}: missing ({found[1]} --help)"
    if found := re.match(r"Missing value for argument '(.*?)'", said):
        return f"{found[1]}: found no value, expected one"
    if found := re.match(r"invalid choice '(.*?)' for argument '(.*?)'.*\((.*)\)", said):
        return f"{found[2]} = {found[1]}: expected one of {found[3]}"
    unread = "invalid literal|could not convert|no type matching|Could not find valid parse"
    if found := re.match(rf"(\S+): (?:{unread})", said):
        values = " ".join(re.findall("'(.*?)'", said))
        usage = usage_of(found[1])
        kind = "number" if "FLOAT" in usage else "whole number"
        kind = f"{kind}s" if "..." in usage else f"a {kind}"
        return f"{found[1]} = {values}: expected {kind}{' or None' if 'None' in usage else ''}"
    return said
