"""What came out: tables beside the paper's figures, costs against worth, one page."""

import io
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from d2m_jax.report import pictures, tables
from d2m_jax.report.measure import Measured, write_whole
from d2m_jax.report.page import Picture, page
from d2m_jax.report.page import Table as Shown
from d2m_jax.report.rows import Row, Run, Student
from d2m_jax.reproduce.cells import Cells, Result
from d2m_jax.reproduce.paper_tables import Cell, Table
from d2m_jax.reproduce.statistics import Interval, Ratio, difference, mean, ratio

COSTS: dict[str, Callable[[Result], float]] = {
    "activated parameters, M": lambda result: result.activated / 1e6,
    "GFLOPs per forward": lambda result: result.gflops,
    "measured time, × the teacher's": lambda result: (
        result.milliseconds[1] / result.milliseconds[0]
    ),
}


@dataclass(frozen=True)
class Found:
    """A cell with what was measured of it, by seed."""

    cell: Cell
    results: Mapping[int, Result]

    def errors(self, seeds: Sequence[int] | None = None) -> list[float]:
        """Distillation errors, of these seeds."""
        return [self.results[seed].errors["seen"] for seed in seeds or sorted(self.results)]

    def scores(self, seeds: Sequence[int] | None = None) -> list[float]:
        """Scores in percent; [] where images are not judged."""
        found = [self.results[seed] for seed in seeds or sorted(self.results)]
        return [100 * one.scores["seen"][0] for one in found if one.scores]

    def score(self) -> Interval | None:
        """Over seeds; of one seed alone over prompts."""
        scores = self.scores()
        if not scores:
            return None
        if len(scores) > 1:
            return mean(scores)
        (one,) = self.results.values()
        return Interval(scores[0], 196 * one.scores["seen"][1])

    def cost(self, of: Callable[[Result], float]) -> float:
        """A mean over seeds."""
        return mean([of(one) for one in self.results.values()]).mean


def gather(table: Table, cells: Cells, seeds: int) -> list[Found]:
    """What is there of a table's cells."""
    found = []
    for cell in table.cells:
        results = {seed: cells.result(cell, seed) for seed in range(seeds)}
        there = {seed: result for seed, result in results.items() if result is not None}
        found.append(Found(cell, there))
    return found


def shown(table: Table, found: Sequence[Found]) -> Shown:
    """A table for people."""
    paper = list(dict.fromkeys(name for one in table.cells for name in one.paper))
    head = ["", "steps\nexamples", "seconds", "seeds", "activated\nM", "GFLOPs", "time,\n× teacher"]
    head += ["distillation\nerror", "score\n%", "error ÷\nreference's", "score −\nreference's"]
    head += [f"paper:\n{name}" for name in paper]
    by_name = {one.cell.name: one for one in found}
    rows = []
    for one in found:
        published = [one.cell.paper.get(name, "") for name in paper]
        if not one.results:
            rows.append(
                [one.cell.label, "not run", *[""] * (len(head) - 2 - len(paper)), *published]
            )
            continue
        first = next(iter(one.results.values()))
        trained = [f"{first.steps:,}\n{first.examples:,}", f"{one.cost(_seconds):,.0f}"]
        costs = [f"{one.cost(of):.3g}" for of in COSTS.values()]
        worth = [_interval(mean(one.errors()), ".3g"), _interval(one.score(), ".1f")]
        rows.append(
            [
                one.cell.label,
                *(trained if first.steps else ["", ""]),
                str(len(one.results)),
                *costs,
                *worth,
                *_against(one, by_name.get(one.cell.against or "")),
                *published,
            ]
        )
    references = {c.against for c in table.cells if c.against}
    labels = [one.cell.label for one in found if one.cell.name in references]
    notes = [
        *table.notes,
        "± is half a 95 % interval of the mean over seeds (Student's t); with one seed, of a score"
        " over prompts. Comparisons are paired by seed, p is that of the paired t-test (of errors"
        " by their logarithms). Time: one forward in turns with the teacher's.",
        *([f"Compared with: {'; '.join(labels)}."] if labels else []),
    ]
    return Shown(table.title, head, rows, notes)


def _seconds(result: Result) -> float:
    return result.seconds


def _against(one: Found, other: Found | None) -> list[str]:
    """Both comparisons with the reference, over the seeds that both have."""
    seeds = sorted(one.results.keys() & other.results.keys()) if other else []
    if other is None or not seeds or min(other.errors(seeds)) <= 0:
        return ["", ""]
    errors = _ratio(ratio(one.errors(seeds), other.errors(seeds)))
    if not one.scores(seeds):
        return [errors, ""]
    return [errors, _interval(difference(one.scores(seeds), other.scores(seeds)), "+.1f")]


def _interval(value: Interval | None, form: str) -> str:
    if value is None:
        return ""
    half = "" if value.half is None else f" ± {value.half:{form.replace('+', '')}}"
    p = f"\np = {value.p:.2g}" if value.p is not None and "+" in form else ""
    return f"{value.mean:{form}}{half}{p}"


def _ratio(value: Ratio) -> str:
    if value.low is None:
        return f"{value.mean:.2f}"
    return f"{value.mean:.2f} ({value.low:.2f} to {value.high:.2f})\np = {value.p:.2g}"


def pareto(found: Sequence[Found]) -> Figure:
    """Error and score of all cells against what they cost; the line joins those that no other beats
    in both."""
    found = [one for one in found if one.results]
    judged = all(one.scores() for one in found)
    figure = Figure(figsize=(13, 8.4 if judged else 4.8), dpi=100, layout="constrained")
    panels = figure.subplots(2 if judged else 1, len(COSTS), squeeze=False)
    for axes, (title, of) in zip(panels[0], COSTS.items(), strict=True):
        students = [one for one in found if one.cell.student is not None]
        points = [(one.cost(of), mean(one.errors())) for one in students]
        _scatter(axes, students, points, better=-1)
        axes.set(xlabel=title, yscale="log")
    panels[0][0].set_ylabel("E ‖v teacher − v student‖²")
    if judged:
        for axes, (title, of) in zip(panels[1], COSTS.items(), strict=True):
            points = [(one.cost(of), one.score() or mean(one.scores())) for one in found]
            _scatter(axes, found, points, better=1)
            axes.set(xlabel=title)
        panels[1][0].set_ylabel("score, %")
    handles, labels = panels[-1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _scatter(
    axes: Axes, found: Sequence[Found], points: Sequence[tuple[float, Interval]], better: int
) -> None:
    for i, (one, (x, y)) in enumerate(zip(found, points, strict=True)):
        axes.errorbar(
            x, y.mean, [[y.mean - max(y.low, 0)], [y.high - y.mean]], label=one.cell.label,
            color=pictures.COLOURS[i % len(pictures.COLOURS)], ls="none", ms=7, capsize=2,
            marker=pictures.MARKERS[i // len(pictures.COLOURS) % len(pictures.MARKERS)],
        )  # fmt: skip
    best, line = None, []
    for x, y in sorted((x, better * y.mean) for x, y in points):
        if best is None or y > best:
            best = y
            line.append((x, better * y))
    if len(line) > 1:
        axes.plot(*zip(*line, strict=True), color="0.6", lw=0.8, zorder=0, drawstyle="steps-post")
    axes.grid(alpha=0.25, which="both", lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def write(
    tables_asked: Sequence[Table], cells: Cells, seeds: int, command: str, budget: Sequence[str]
) -> None:
    """Print the tables of what is there, and leave reproduce.html, reproduce.json and pictures."""
    about, folder = cells.about, cells.folder
    everything = {table.name: gather(table, cells, seeds) for table in tables_asked}
    looks, parts, console = [], [], Console(width=max(Console().width, 220))
    for table in tables_asked:
        found = everything[table.name]
        text = shown(table, found)
        console.print(tables.for_terminal(text))
        parts.append(text)
        if sum(bool(one.results) for one in found) > 1:
            content = _png(pareto(found))
            write_whole(folder / f"{table.name}.png", content)
            caption = (
                "The line joins the cells that no other beats in cost and worth at once; bars are"
                " 95 % intervals."
            )
            parts.append(Picture(f"{table.title}: costs and worth", content, caption))
        if table.name == "main":
            looks = _looks(found, cells)
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    facts = [
        f"Students of {cells.recipe.base.teacher}, {cells.recipe.steps:,} steps each; every number"
        " is of a run of its own.",
        f"{about['date']}, commit {about['commit'] or 'unknown'}; {about['processor']},"
        f" {about['cores']} cores, {about['device']}; {versions}",
        *budget,
        command,
    ]
    html = page("The paper's comparisons in miniature", facts, looks, {}, parts)
    write_whole(folder / "reproduce.html", html.encode())
    content = about | {"command": command, "tables": _json(tables_asked, everything)}
    write_whole(folder / "reproduce.json", (json.dumps(content, indent=1) + "\n").encode())
    print(f"tables: {folder / 'reproduce.html'}")


def _looks(found: Sequence[Found], cells: Cells) -> list[Picture]:
    """Samples of all cells side by side, and errors while they trained; of the first seed."""
    there = [one.cell for one in found if 0 in one.results]
    looked = {cell.name: cells.look(cell, 0) for cell in there}
    rows: dict[Row, Measured] = {}
    students = []
    for cell in there:
        run, row, measured = looked[cell.name]
        named = replace(row, student=textwrap.fill(cell.label, 18), stage="")
        rows[named] = measured
        if run.students:
            students.append(Student(cell.name, run.main.pruned, run.main.rows, run.main.history))
    result = []
    if rows and all(len(measured.samples) for measured in rows.values()):
        caption = "The same prompts and the same noise in every column."
        result.append(Picture("Samples", _png(pictures.samples(list(rows), rows)), caption))
    if students:
        run = Run(cells.recipe.base, next(iter(rows)), tuple(students))
        caption = "Lines with points: on validation images; thin: on training batches."
        content = _png(pictures.curves(run))
        write_whole(cells.folder / "curves.png", content)
        result.append(Picture("Error while training", content, caption))
    return result


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", facecolor="white")
    return content.getvalue()


def _json(asked: Sequence[Table], everything: Mapping[str, Sequence[Found]]) -> dict[str, Any]:
    return {
        table.name: [
            {
                "name": one.cell.name,
                "label": one.cell.label,
                "against": one.cell.against,
                "paper": dict(one.cell.paper),
                "seeds": {seed: asdict(result) for seed, result in one.results.items()},
            }
            for one in everything[table.name]
        ]
        for table in asked
    }
