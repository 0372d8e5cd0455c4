"""All cells that were asked for: what they will cost, then one after the other."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax

from d2m_jax import hosts
from d2m_jax.config import check, suggestion
from d2m_jax.reproduce import outcome
from d2m_jax.reproduce.cells import Cells, Costs, Result, unique
from d2m_jax.reproduce.paper_tables import Cell, Table
from d2m_jax.reproduce.recipe import Recipe


def make(
    recipe: Recipe,
    tables: Sequence[Table],
    folder: Path,
    seeds: int,
    names: Sequence[str],
    limit: float | None,
    command: str,
) -> None:
    """Make the cells of these tables below `folder`, the first seed's first, and write what came
    out. None begins that would end after `limit` (of time.monotonic); with `names` those alone, and
    what they are compared with."""
    _keep_programs(folder / "programs")
    tables, cells = chosen(tables, names), Cells(recipe, folder)
    every = [(cell, seed) for seed in range(seeds) for table in tables for cell in table.cells]
    asked = unique(every, cells)
    for cell, _ in asked:
        cells.work(cell)  # what cannot be is told before anything trains
    budget = []
    if limit is None or time.monotonic() < limit:
        costs = cells.costs()
        budget = told(cells, tables, asked, seeds, costs)
        print("\n".join(budget), flush=True)
        _make(cells, asked, costs, limit)
    outcome.write(tables, cells, seeds, command, budget)


def _keep_programs(folder: Path) -> None:
    """Seeds share programs, and so does the next start."""
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def chosen(tables: Sequence[Table], names: Sequence[str]) -> list[Table]:
    """The tables with these cells alone and what they are compared with, if any are named."""
    if not names:
        return list(tables)
    known = {cell.name for table in tables for cell in table.cells}
    for name in names:
        expected = f"expected {', '.join(sorted(known))}"
        check(name in known, f"--cells {name}: no cell{suggestion(name, known)} ({expected})")
    result = []
    for table in tables:
        wanted = {cell.name for cell in table.cells if cell.name in names}
        wanted |= {c.against for c in table.cells if c.name in wanted and c.against is not None}
        if wanted:
            left = tuple(cell for cell in table.cells if cell.name in wanted)
            result.append(replace(table, cells=left))
    return result


def told(
    cells: Cells,
    tables: Sequence[Table],
    asked: Sequence[tuple[Cell, int]],
    seeds: int,
    costs: Costs,
) -> list[str]:
    """What each table and all of them will cost."""
    total = cells.estimates(asked, costs)
    there = sum(not estimate for estimate in total)
    lines = []
    for table in tables:
        mine = unique([(cell, seed) for seed in range(seeds) for cell in table.cells], cells)
        left = [estimate for estimate in cells.estimates(mine, costs) if estimate]
        steps = max(cells.steps(cell) for cell in table.cells)
        lines.append(
            f"{table.name}: {len(table.cells)} cells × {seeds} seeds of {steps:,} steps,"
            f" {len(mine) - len(left)} there, about {_minutes(sum(left))} for {len(left)}"
        )
    lines.append(
        f"in all {len(asked)} cells, {there} there, about {_minutes(sum(total))} on this machine"
        f" (beside its steps a cell takes {costs.overhead:.0f} s)"
    )
    return lines


def _make(
    cells: Cells, asked: Sequence[tuple[Cell, int]], costs: Costs, limit: float | None
) -> None:
    left = [(cell, seed) for cell, seed in asked if cells.result(cell, seed) is None]
    for i, (cell, seed) in enumerate(left, 1):
        (estimate,) = cells.estimates([(cell, seed)], costs)
        if limit is not None and time.monotonic() + estimate > limit:
            hosts.say(f"{cell.name}, seed {seed}: would take {_minutes(estimate)}, left out")
            continue
        hosts.say(f"{i} of {len(left)}: {cell.name}, seed {seed}, about {_minutes(estimate)}")
        hosts.say(_line(cell, seed, cells.make(cell, seed)))
        costs = cells.costs()


def _line(cell: Cell, seed: int, result: Result) -> str:
    score = f", score {100 * result.scores['seen'][0]:.1f} %" if result.scores else ""
    return (
        f"{cell.label}, seed {seed}: error {result.errors['seen']:.3g}{score}"
        f" ({result.steps:,} steps, {result.seconds:,.0f} s)"
    )


def _minutes(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
