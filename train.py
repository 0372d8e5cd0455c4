"""Train or distill a model: python train.py CONFIG.py [--run-dir DIR] [--any.field value]

Goes on where it stopped if DIR (default: runs/ and the config's name) holds a run of that config.
`python train.py CONFIG.py --help` lists every field.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from d2m_jax import command_line
from d2m_jax.config import RunConfig, check


@dataclass(frozen=True)
class Arguments:
    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    run_dir: Path | None = None  # default: runs/ and the config's name


def main(arguments: Sequence[str]) -> None:
    if list(arguments) in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    found = arguments[0] if arguments else "none"
    check(found.endswith(".py"), f"CONFIG: expected a Python file with get_config(), found {found}")
    config = command_line.load_config(arguments[0])
    check(
        isinstance(config, RunConfig),
        f"{arguments[0]}: get_config() returns {type(config).__name__}, expected RunConfig",
    )
    parsed = command_line.parse(
        Arguments,
        arguments[1:],
        usage=f"train.py {arguments[0]}",
        description=__doc__,
        default=Arguments(config),
    )
    # Imported once the arguments are right: help and errors need not wait for jax.
    from d2m_jax.evaluate import accounting, report
    from d2m_jax.sharding import use_cores
    from d2m_jax.training import run

    use_cores()
    run_directory = parsed.run_dir or Path("runs") / parsed.config.name
    run.run(parsed.config, run_directory, accounting.flops_per_example)
    if parsed.config.teacher is not None:
        report.write(run_directory, shlex.join(["python", "train.py", *arguments]))


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv[1:]))
