"""The tables of a report, as text that a terminal and a page can show."""

from collections.abc import Sequence
from dataclasses import replace

import rich.table
from rich.text import Text

from d2m_jax.data.icons import CATEGORIES
from d2m_jax.evaluate.comparison import By, note
from d2m_jax.evaluate.findings import Findings
from d2m_jax.evaluate.held_out import BATCH
from d2m_jax.evaluate.icons import Estimate
from d2m_jax.evaluate.page import Table
from d2m_jax.evaluate.rows import Row

BY_NAME: dict[By, str] = {"steps": "equal steps", "seconds": "equal time"}


def worth(findings: Findings) -> Table:
    """What every row is worth, beside the rival."""
    rival = findings.run.rival
    head = ["", "held-out\nerror", "score\n%", "chance\n%"]
    head += ["error,\nheld-out pairs", "score,\nheld-out pairs"]
    for by in BY_NAME.values() if rival else ():
        head += [f"score − rival\nat {by}", f"error ÷ rival\nat {by}"]
    marks, rows = {}, []
    for row in findings.run.rows:
        measured = findings.measured[row]
        seen, held_out = measured.scores["seen"], measured.scores["held_out"]
        cells = [row.label, _error(measured.errors["seen"]), interval(seen.overall)]
        cells += [f"{100 * seen.chance.mean:.1f}", _error(measured.errors["held_out"])]
        cells += [interval(held_out.overall)]
        compared = findings.compared.get(row, {})
        for by in BY_NAME if rival else ():
            if by not in compared:
                cells += ["", ""]
                continue
            text, mark = note(row, compared[by]), ""
            if text:
                mark = f" [{marks.setdefault(text, len(marks) + 1)}]"
            cells += [interval(compared[by].score, "+") + mark, f"{compared[by].error:.2f}"]
        rows.append(cells)
    seen, held_out = (f"{findings.prompts[pairs]:,}" for pairs in ("seen", "held_out"))
    notes = [
        f"Scores on {seen} prompts of trained pairs of glyph and colour, and {held_out} of pairs"
        " never trained; the same noise for all. ± is half a 95 % interval, of differences over the"
        " same prompts. Held-out error: E ‖v teacher − v student‖² on images that no training saw.",
    ]
    if rival:
        notes.append(f"The rival is {rival.name}, pruned in width to the same activated FFN.")
    notes += [f"[{number}] {text}." for text, number in marks.items()]
    return Table("What it is worth", head, rows, notes, _sections(findings))


def costs(findings: Findings) -> Table:
    """What every row costs."""
    head = ["", "parameters", "activated", "GFLOPs\nper forward"]
    head += [f"ms per image,\nbatch {batch}" for batch in findings.milliseconds]
    head += ["training\nsteps", "training\nseconds"]
    rows = []
    for row in findings.run.rows:
        cost = findings.accounts[row].total
        times = [f"{found[row]:.3g}" for found in findings.milliseconds.values()]
        trained = [f"{row.steps:,}", f"{row.seconds:,.0f}"] if row.stage else ["", ""]
        size = [f"{cost.parameters:,}", f"{cost.activated:,}"]
        rows.append([row.label, *size, f"{findings.gflops[row]:.3g}", *times, *trained])
    notes = [
        "Milliseconds per image of one forward of the transformer, medians of alternating rounds in"
        f" one process; batch {BATCH} uses all cores, batch 1 one device. Rows of equal shape share"
        " a measurement.",
    ]
    return Table("What it costs", head, rows, notes, _sections(findings))


def categories(findings: Findings) -> Table:
    """Scores by category."""
    first = findings.measured[findings.run.teacher].scores["seen"]
    names = [name for name in CATEGORIES if name in first.categories]
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
            interval(measured.scores["seen"].overall),
        ]
        for k, measured in found.items()
    ]
    count = len(next(iter(found.values())).scores["seen"].prompts)
    notes = [f"{row.label}, nothing retrained; {count} prompts."]
    return Table("Experts per token, chosen at run time", ["", "error", "score %"], rows, notes)


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
