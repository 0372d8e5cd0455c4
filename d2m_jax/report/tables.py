"""The tables of a report, as text that a terminal and a page can show."""

from collections.abc import Sequence
from dataclasses import replace

import rich.box
import rich.table
from rich.text import Text

from d2m_jax.evaluate.scores import Estimate
from d2m_jax.report.comparison import note
from d2m_jax.report.findings import Findings
from d2m_jax.report.page import Table
from d2m_jax.report.rows import Row


def costs(findings: Findings) -> Table:
    """What every row costs."""
    head = ["", "parameters\nM", "activated\nM", "GFLOPs per\nforward"]
    head += [f"ms/image\nbatch {batch}" for batch in findings.milliseconds]
    head += ["trained\nsteps", "trained\nseconds"]
    rows = []
    for row in findings.run.rows:
        cost = findings.accounts[row].total
        size = [f"{count / 1e6:.3f}" for count in (cost.parameters, cost.activated)]
        times = [f"{found[row]:.3g}" for found in findings.milliseconds.values()]
        trained = [f"{row.steps:,}", f"{row.seconds:,.0f}"] if row.stage else ["", ""]
        rows.append([row.label, *size, f"{findings.gflops[row]:.3g}", *times, *trained])
    notes = [
        "Milliseconds per image are of one forward of the transformer: medians of rounds in which"
        f" the models took turns; batches of {findings.batch} on all devices"
        + ", single images on one" * (1 in findings.milliseconds)
        + "."
        + f" Images of {findings.pixels}." * bool(findings.pixels)
        + " Rows of equal shape share a measurement. Seconds are those spent in training steps.",
    ]
    return Table("What it costs", head, rows, notes, _sections(findings))


def worth(findings: Findings) -> Table:
    """What every row is worth."""
    if not findings.judged:
        rows = [
            [row.label, _error(findings.measured[row].errors["seen"])] for row in findings.run.rows
        ]
        notes = ["Distillation error: E ‖v teacher − v student‖² on images that never trained."]
        return Table(
            "What it is worth", ["", "distillation\nerror"], rows, notes, _sections(findings)
        )
    head = ["", "distillation\nerror", "score\n%", "chance\n%"]
    head += ["error,\nnew pairs", "score,\nnew pairs %"]
    rows = []
    for row in findings.run.rows:
        measured = findings.measured[row]
        seen, held_out = measured.scores["seen"], measured.scores["held_out"]
        cells = [row.label, _error(measured.errors["seen"]), interval(seen.overall)]
        cells += [f"{100 * seen.chance.mean:.1f}", _error(measured.errors["held_out"])]
        rows.append([*cells, interval(held_out.overall)])
    seen, held_out = (f"{findings.prompts[pairs]:,}" for pairs in ("seen", "held_out"))
    notes = [
        "Distillation error: E ‖v teacher − v student‖² on images that no training saw. Scores:"
        f" {seen} prompts, and {held_out} of new pairs of pictogram and colour, with the same noise"
        " for all; ± is half a 95 % interval. Chance: the right image judged by another caption.",
    ]
    return Table("What it is worth", head, rows, notes, _sections(findings))


def against(findings: Findings) -> Table | None:
    """Every row of the other students beside the rival."""
    rival, shallow = findings.run.rival, findings.run.shallow_rival
    if rival is None or shallow is None:
        return None
    head, judged = [""], findings.judged
    for by in ("equal steps", "equal time"):
        head += [*([f"{by}:\nscore − rival's"] if judged else []), f"{by}:\nerror ÷ rival's"]
    numbers, rows, others = {}, [], list(findings.compared)
    for row in others:
        cells = [row.label]
        for comparison in findings.compared[row].values():
            text = note(row, comparison)
            mark = f" [{numbers.setdefault(text, len(numbers) + 1)}]" if text else ""
            if comparison.score is None:
                cells.append(f"{comparison.error:.2f}{mark}")
            else:
                cells += [interval(comparison.score, "+") + mark, f"{comparison.error:.2f}"]
        rows.append(cells)
    notes = [
        f"The rival is {rival.name}: pruned, so that all of it always runs."
        + (
            f" That of Mixtures of Blocks is {shallow.name}, of fewer blocks."
            if shallow is not rival and any(row.mixes for row in findings.run.rows)
            else ""
        )
        + " Differences of scores in points over the same prompts, with half a 95 % interval."
        * judged,
        *(f"[{number}] {text}." for text, number in numbers.items()),
    ]
    sections = [i for i in range(1, len(rows)) if others[i].student != others[i - 1].student]
    return Table("Against the rival", head, rows, notes, sections)


def categories(findings: Findings) -> Table | None:
    """Scores by category."""
    if not findings.judged:
        return None
    first = findings.measured[findings.run.teacher].scores["seen"]
    names = list(first.categories)
    rows = []
    for row in findings.run.rows:
        shares = findings.measured[row].scores["seen"].categories
        rows.append([row.label, *(f"{100 * shares[name]:.1f}" for name in names)])
    floor = replace(first, correct=first.floor).categories
    rows.append(["chance floor", *(f"{100 * floor[name]:.1f}" for name in names)])
    sections = [*_sections(findings), len(rows) - 1]
    return Table("Scores by category, %", ["", *names], rows, (), sections)


def sweep(findings: Findings) -> Table | None:
    """The main MoE by experts per token."""
    if findings.sweep is None:
        return None
    row, found = findings.sweep
    own = row.config.transformer.moe.top_k
    rows = [
        [
            f"k = {k}" + (" (trained)" if k == own else ""),
            _error(measured.errors["seen"]),
            *(interval(score.overall) for score in measured.scores.values()),
        ]
        for k, measured in found.items()
    ]
    head, note = ["", "error"], f"{row.label}, nothing retrained"
    if findings.judged:
        head.append("score %")
        note += f"; {len(next(iter(found.values())).scores['seen'].prompts)} prompts"
    return Table("Experts per token, chosen at run time", head, rows, [f"{note}."])


def health(findings: Findings, row: Row) -> Table:
    """Routing health of a row's MoE layers."""
    layers, _ = findings.routing[row]
    rows = [
        [
            layer.name,
            f"{layer.health['entropy']:.3f}",
            f"{layer.health['largest_load']:.2f}",
            f"{layer.health['dead_experts']:.0f}",
        ]
        for layer in layers
    ]
    head = ["", "entropy of loads\n(1: even)", "largest load\n(× even)", "dead\nexperts"]
    return Table(f"Health of routing: {row.label}", head, rows)


def for_terminal(table: Table) -> rich.table.Table:
    """The same for a terminal."""
    result = rich.table.Table(
        box=rich.box.SIMPLE,
        collapse_padding=True,
        pad_edge=False,
        title=Text(table.title),
        caption=Text("\n".join(table.notes)),
        title_justify="left",
        caption_justify="left",
    )
    for i, name in enumerate(table.head):
        result.add_column(Text(name), justify="right" if i else "left", no_wrap=True)
    for i, row in enumerate(table.rows):
        if i in table.sections:
            result.add_section()
        result.add_row(*map(Text, row))
    return result


def interval(estimate: Estimate, sign: str = "") -> str:
    """A share in percent with half its 95 % interval."""
    return f"{100 * estimate.mean:{sign}.1f} ± {196 * estimate.standard_error:.1f}"


def _error(value: float) -> str:
    return f"{value:.3g}"


def _sections(findings: Findings) -> Sequence[int]:
    """Where the rows of another student begin."""
    names = [row.student for row in findings.run.rows]
    return [i for i in range(1, len(names)) if names[i] != names[i - 1]]
