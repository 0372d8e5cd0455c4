"""What --help says of a field, the comment beside or above it, stands in the reference too."""

import io
import tokenize
from pathlib import Path
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Makes the comment of a dataclass's field its docstring."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Griffe has read a variable."""
        of_class = attr.parent is not None and attr.parent.is_class
        if not of_class or attr.docstring or attr.lineno is None or attr.endlineno is None:
            return
        assert isinstance(attr.filepath, Path)
        lines = attr.filepath.read_text().splitlines()
        comment = beside(lines[attr.lineno - 1 : attr.endlineno]) or above(lines, attr.lineno - 1)
        if comment:
            attr.docstring = griffe.Docstring(comment, lineno=attr.lineno, parent=attr)


def beside(lines: list[str]) -> str:
    """The comments of a field's own lines."""
    tokens = tokenize.generate_tokens(io.StringIO("\n".join(lines).strip()).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return " ".join(comment.lstrip("# ") for comment in comments)


def above(lines: list[str], end: int) -> str:
    """The comments that end where a field begins."""
    start = end
    while lines[start - 1].strip().startswith("#"):
        start -= 1
    return " ".join(line.strip("# ") for line in lines[start:end])
