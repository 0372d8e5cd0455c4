"""Train or distill a model: {program} CONFIG [--run_dir DIR --any.field value …]

CONFIG is a Python file with get_config(), or the name of one of those that come with the package.
Goes on where it stopped if DIR (default: runs/ and the config's name) holds a run of that config.
`--plan --topology v5p:4x4x4` trains nothing, and tells after some minutes of compilation what every
stage would need there: memory, collectives, time. `{program} CONFIG --help` lists every field.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from d2m_jax import command_line  # first, for it tells where there is no environment

# isort: split
import tyro

from d2m_jax.config import FluxConfig, ModelConfig, RunConfig, check

EXAMPLE = "icons_moe_s --run_dir runs/mine --seed 1"

REPORT_KEEPS = "all training is done, and what the report has measured is kept: start again for it"


@dataclass(frozen=True)
class Arguments:
    """The arguments of the command."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    run_dir: Path | None = None  # default: runs/ and the config's name
    plan: bool = False  # compile every stage for a topology, run none
    topology: str = "h200:1"  # of --plan: v5e:4x8, v5p:4x4x4, v6e:8x8, h100:8; v6e:16x16:4: pods
    rival: str | None = None  # of --plan: this one's stages; default: the main student's
    output: Path | None = None  # of --plan: a JSON file for what it prints
    among: command_line.AmongProcesses = command_line.Among()


def main(arguments: Sequence[str], program: str = "train.py") -> None:
    """The command; `program` is what it was called by."""
    said = (__doc__ or "").format(program=command_line.launched(program))
    if list(arguments) in (["-h"], ["--help"]):
        print(command_line.with_example(said, program, EXAMPLE))
        return
    found = arguments[0] if arguments else "none"
    check(
        bool(arguments) and not found.startswith("-"),
        "CONFIG: expected a Python file with get_config() before all options,"
        f" {program} CONFIG --run_dir DIR, found {found}",
    )
    config = command_line.load_config(arguments[0])
    model = isinstance(config, FluxConfig | ModelConfig)
    hint = "; it is for evaluate.py account, configs/flux_distill.py trains" if model else ""
    check(
        isinstance(config, RunConfig),
        f"{arguments[0]}: get_config() returns {type(config).__name__}, expected RunConfig{hint}",
    )
    parsed = command_line.parse(
        Arguments,
        arguments[1:],
        usage=f"{program} {arguments[0]}",
        description=said,
        example="--run_dir runs/mine --seed 1",
        default=Arguments(config),
    )
    # Imported once the arguments are right: help and errors need not wait for jax.
    if parsed.plan:
        from d2m_jax.output import check_writable
        from d2m_jax.planning.dry_run import dry_run

        if parsed.output is not None:
            check_writable(parsed.output)

        dry_run(parsed.config, parsed.topology, parsed.output, parsed.rival)
        return
    from d2m_jax import hosts
    from d2m_jax.config import to_json
    from d2m_jax.cores import use_cores
    from d2m_jax.output import full_disk
    from d2m_jax.report import write
    from d2m_jax.report.check import check_report
    from d2m_jax.training import lock, run
    from d2m_jax.weights.files.hub import check_folder_name

    run_directory = parsed.run_dir or Path("runs") / parsed.config.name
    check_folder_name(run_directory)
    use_cores(parsed.config.quick_compilation)
    command = shlex.join([*command_line.launched(program).split(), *arguments])
    with hosts.joined(*parsed.among.who):
        hosts.agree({"config": to_json(parsed.config), "run_dir": str(run_directory)})
        with lock.held(run_directory), full_disk(run_directory, run.KEPT):
            run.run(parsed.config, run_directory, partial(check_report, parsed.config))
            if parsed.config.teacher is not None:
                try:
                    hosts.by_first(lambda: write.write(run_directory, command))
                except KeyboardInterrupt:
                    print(REPORT_KEEPS, file=sys.stderr)
                    raise


def command() -> int:
    """The command as it is installed; its exit code."""
    return command_line.run(partial(main, program="d2m-train"), sys.argv[1:])
