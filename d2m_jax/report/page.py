"""The page of a report: one HTML file that needs nothing else, for any screen, light or dark."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --dim: #777; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p, ul { max-width: 48rem; } small, .dim { color: var(--dim); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; vertical-align: top; }
th { vertical-align: bottom; white-space: pre-line; font-weight: 600; }
td { border-top: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
tr.first td { border-top: 2px solid var(--dim); }
ul.verdicts { list-style: none; padding: 0; } ul.verdicts li { margin: .25rem 0; }
.yes::before { content: "✓ "; color: #2a2; } .no::before { content: "✗ "; color: #d33; }
figure { margin: 0; } figure div { overflow-x: auto; background: #fff; border-radius: 6px; }
img { display: block; width: 100%; min-width: 34rem; height: auto; }
figcaption { color: var(--dim); font-size: .85rem; max-width: 48rem; margin-top: .3rem; }
"""


@dataclass(frozen=True)
class Table:
    """Cells as text, the first of a row its name; `sections` are rows that begin a new part."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    sections: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """A PNG and what to say of it."""

    title: str
    png: bytes
    caption: str


def page(
    title: str,
    facts: Sequence[str],
    first: Sequence[Picture],
    verdicts: Mapping[str, Sequence[tuple[str, bool]]],
    parts: Sequence[Table | Picture],
) -> str:
    """The HTML: title, facts, the pictures that say most, sentences by model (aim met or missed),
    then the parts."""
    said = "".join(
        f"<h3>{escape(model)}</h3><ul class=verdicts>"
        + "".join(
            f'<li class="{"yes" if met else "no"}">{escape(text)}</li>' for text, met in lines
        )
        + "</ul>"
        for model, lines in verdicts.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1><p class=dim>{'<br>'.join(map(escape, facts))}</p>"
        + "".join(map(_picture, first))
        + said
        + "".join(_table(part) if isinstance(part, Table) else _picture(part) for part in parts)
        + "</body></html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    body = "".join(
        ("<tr class=first>" if i in table.sections else "<tr>")
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for i, row in enumerate(table.rows)
    )
    notes = "".join(f"<br>{escape(note)}" for note in table.notes)
    return (
        f"<h2>{escape(table.title)}</h2><div class=wide><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div><p><small>{notes.removeprefix('<br>')}</small></p>"
    )


def _picture(picture: Picture) -> str:
    png = base64.b64encode(picture.png).decode()
    return (
        f"<h2>{escape(picture.title)}</h2><figure><div>"
        f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{png}"></div>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )
