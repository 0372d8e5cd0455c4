"""The paper's comparisons in miniature, each cell of a table a short distillation run of its own.

    python -m d2m_jax.evaluate.reproduce [TABLE …] [--budget MINUTES] [--seeds N] [--output DIR]

TABLE: main, mlp, experts, depth, places, starts, stages, groups, features, balance, routers, topk;
none: all.
Cells are kept below DIR by their settings: stopped at any moment and started again, with more seeds
or other tables, it goes on, and a cell of two tables trains once. What all of it will cost is told
before it starts; nothing begins that would end after the budget. All cells of the first seed come
first.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from d2m_jax import command_line  # first, for it tells where there is no environment

# isort: split
import tyro

from d2m_jax.config import check, suggestion, teacher_path


@dataclass(frozen=True)
class Arguments:
    """The arguments of the command."""

    tables: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TABLE …")] = ()
    # The run of which all cells are variations: a file, or the name of one that comes along.
    config: str = "icons_moe_s"
    cells: tuple[str, ...] = ()  # of these tables, by name, and those they are compared with
    seeds: int = 3
    steps: int | None = None  # of every student; default: those of the config's
    prompts: int | None = None  # that every model draws; default: the config's
    budget: float | None = None  # minutes in all; 0 trains nothing, and writes what is there
    output: Path = Path("runs/reproduce")


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parsed = command_line.parse(
        Arguments,
        arguments,
        usage="python -m d2m_jax.evaluate.reproduce",
        description=__doc__ or "",
        example="main mlp --seeds 2 --budget 60 --output runs/reproduce",
    )
    check(parsed.seeds >= 1, f"--seeds {parsed.seeds}: expected at least 1")
    check(parsed.steps is None or parsed.steps >= 4, f"--steps {parsed.steps}: expected at least 4")
    base = command_line.load_run(parsed.config)
    if parsed.prompts is not None:
        base = replace(base, evaluate_prompts=parsed.prompts)
    # Imported once the arguments are right: help and errors need not wait for jax.
    from d2m_jax.cores import use_cores
    from d2m_jax.output import check_writable
    from d2m_jax.weights.directory import model_directory

    use_cores(base.quick_compilation)
    from d2m_jax.reproduce.all_cells import make
    from d2m_jax.reproduce.paper_tables import TABLES
    from d2m_jax.reproduce.recipe import Recipe, total_steps

    for name in parsed.tables:
        known = f"expected {', '.join(TABLES)}"
        check(name in TABLES, f"{name}: no table{suggestion(name, TABLES)} ({known})")
    check_writable(parsed.output / "reproduce.html")
    teacher = model_directory.load_config(teacher_path(str(base.teacher))).transformer
    recipe = Recipe(base, teacher, parsed.steps or total_steps(base.stages))
    tables = [TABLES[name](recipe) for name in parsed.tables or TABLES]
    command = shlex.join(["python", "-m", "d2m_jax.evaluate.reproduce", *arguments])
    limit = None if parsed.budget is None else time.monotonic() + 60 * parsed.budget
    make(recipe, tables, parsed.output, parsed.seeds, parsed.cells, limit, command)


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv[1:]))
