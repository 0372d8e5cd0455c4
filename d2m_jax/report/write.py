"""The report of a distillation run: report.json for programs, report.html and tables for people."""

import io
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from d2m_jax.measured_on import measured_on
from d2m_jax.report import pictures, tables
from d2m_jax.report.comparison import FEWEST_STEPS
from d2m_jax.report.findings import Findings, gather, to_json
from d2m_jax.report.measure import Bench, write_whole
from d2m_jax.report.page import Picture, Table, page
from d2m_jax.report.rows import Row, read

TOO_SHORT = (
    "trained for {} steps, too few to be held against any aim; that every stage ran is what a run"
    " like this shows"
)


def write(run_directory: Path | str, command: str | None = None) -> None:
    """Measure the models of a run and print the tables.

    Leaves report.json, report.html and the pictures in report/. Scores and errors are kept in
    evaluation/, so that a killed report goes on and ends with the same. `command` is told in the
    report. Raises ConfigError where the directory holds no run with a teacher.
    """
    directory = Path(run_directory)
    run = read(directory)
    about = measured_on(("jax", "flax", "numpy")) | {
        "name": run.config.name,
        "seed": run.config.seed,
        "command": command,
    }
    findings = gather(run, Bench(run, directory / "evaluation", about["versions"]))
    drawn = _draw(findings)
    for name, picture in drawn.items():
        write_whole(directory / "report" / f"{name}.png", picture.png)
    html = _page(findings, about, drawn)
    write_whole(directory / "report.html", html.encode())
    content = json.dumps(about | to_json(findings), indent=1) + "\n"
    write_whole(directory / "report.json", content.encode())
    console = Console(width=max(Console().width, 100))  # less would cut the tables
    for table in filter(None, _main_tables(findings)):
        console.print(tables.for_terminal(table))
    for row, judged in findings.verdicts.items():
        if row.student == run.main.name:
            said = [f"{'✓' if verdict.met else '✗'} {verdict.text}" for verdict in judged.values()]
            if row.steps < FEWEST_STEPS:
                said = [TOO_SHORT.format(row.steps)]
            for line in (f"\n{row.label}:", *said):
                console.print(line, highlight=False, markup=False)
    print(f"report: {directory / 'report.html'}")


def _main_tables(findings: Findings) -> list[Table | None]:
    return [tables.costs(findings), tables.worth(findings), tables.against(findings)]


def _draw(findings: Findings) -> dict[str, Picture]:
    """The pictures by name."""
    run, measured = findings.run, findings.measured
    judged, milliseconds = findings.judged, findings.milliseconds[findings.batch]
    drawn = {
        "costs": Picture(
            "Score against cost" if judged else "Error against cost",
            _png(pictures.costs(run, measured, findings.gflops, milliseconds, findings.batch)),
            "Bars are 95 % intervals." if judged else "The dotted line is the teacher's cost.",
        ),
        "curves": Picture(
            "Distillation error while training",
            _png(pictures.curves(run)),
            "Lines with points: on validation images; thin: on training batches. Dotted: the end of"
            " a stage. Seconds count training steps alone.",
        ),
    }
    if len(measured[run.teacher].samples):
        drawn["samples"] = Picture(
            "Samples, side by side",
            _png(pictures.samples(run.finals, measured)),
            "The same prompts and the same noise in every column"
            + (
                ": the first two prompts of each category. Frames say what the oracle says."
                if judged
                else "."
            ),
        )
    for row, (layers, groups) in findings.routing.items():
        caption = (
            "How often each expert is chosen, as a multiple of the even share: by timestep (left)"
            " and by place in the image (right"
            + f", of {findings.pixels}" * bool(findings.pixels)
            + "), on noisy images that did not train."
        )
        if groups:
            caption += " At the end, the share of samples that run each block of a group."
        picture = Picture(f"Routing: {row.label}", _png(pictures.routing(layers, groups)), caption)
        drawn[_routing_name(row)] = picture
    return drawn


def _routing_name(row: Row) -> str:
    return "routing_blocks" if row.mixes else "routing"


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", facecolor="white")
    return content.getvalue()


def _page(findings: Findings, about: dict[str, Any], drawn: dict[str, Picture]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    facts = [
        f"Students cut from {findings.run.config.teacher} and trained to answer as it does.",
        f"{about['date']}, commit {about['commit'] or 'unknown'}, seed {about['seed']}",
        f"{about['processor']}, {about['cores']} cores, {about['device']}; {versions}",
        *([about["command"]] if about["command"] else []),
    ]
    judged = {
        row.label: [(verdict.text, verdict.met) for verdict in verdicts.values()]
        for row, verdicts in findings.verdicts.items()
        if row.steps >= FEWEST_STEPS
    }
    parts: list[Table | Picture | None] = [
        *_main_tables(findings),
        drawn["costs"],
        tables.categories(findings),
        tables.sweep(findings),
    ]
    for row in findings.routing:
        parts += [
            drawn[_routing_name(row)],
            tables.health(findings, row),
        ]
    first = [drawn[name] for name in ("samples", "curves") if name in drawn]
    return page(about["name"], facts, first, judged, [part for part in parts if part is not None])
