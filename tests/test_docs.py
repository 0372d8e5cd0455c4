"""The documentation: the site builds without a warning, holds what it should, and names files that
are there."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import d2m_jax

ROOT = Path(__file__).parent.parent
PAGES = sorted({*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"})


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_reference_holds_the_whole_package(site):
    told = "".join(page.read_text() for page in site.glob("reference/*.html"))
    for file in ROOT.glob("d2m_jax/**/*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if file.name != "__init__.py" and file.parent.name != "torch_module":
            assert f'id="{module}"' in told, f"{module}: expected a part of the reference"
    for name in set(d2m_jax.__all__) - {"__version__"}:
        assert re.search(rf'id="d2m_jax\.[\w.]+\.{name}"', told), f"{name}: not in the reference"


def test_reference_says_of_a_field_what_help_says(site):
    told = (site / "reference/config.html").read_text()
    assert "global norm; 0 turns clipping off" in told  # beside the field
    assert "How times are drawn in training and calibration" in told  # above it


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = r'<(?:script|img|iframe|link)\b[^>]+(?:src|href)="(https?:[^"]+)'
        assert not re.findall(loaded, page.read_text()), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    """In backticks, from the root of the repository or of the package."""
    code = re.findall(r"`[^`\n]+`", re.sub(r"(?ms)^```.*?^```", "", page.read_text()))
    for path in re.findall(r"(?<![\w/.*{-])\w[\w/]*/\w+\.py(?!\w)", " ".join(code)):
        found = [root / path for root in (ROOT, ROOT / "d2m_jax")]
        assert any(file.exists() for file in found), f"{page.name} names {path}"


def test_troubleshooting_quotes_what_the_code_says():
    """Of a quoted message every part between two … is in some string of the package."""
    files = [*ROOT.glob("d2m_jax/**/*.py"), *ROOT.glob("*.py")]
    said = "\n".join(text for file in files for text in strings(ast.parse(file.read_text())))
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]*…[^`]*)`", page, re.MULTILINE)
    assert len(quoted) > 30
    parts = {part for message in quoted for part in message.split("…")}
    assert not {part for part in parts if part not in said}


def strings(tree: ast.AST) -> Iterator[str]:
    """The text of all strings, of those with values in them what is around the values."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [getattr(part, "value", "…") for part in node.values]
            yield "".join(part if isinstance(part, str) else "…" for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
