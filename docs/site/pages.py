"""Pages of the site that no file of docs/ holds: the reference, one page for each room of the
package, and every file of the repository that a page links to. mkdocs calls the `on_` functions."""

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()([^\s():#]+)(?=[#)])")  # its path: no anchor, no other site
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".json": "json"}
log = get_plugin_logger("pages")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of docs/, and those pages."""
    for path, text in reference().items():
        files.append(File.generated(config, path, content=text))
    waiting = list(files.documentation_pages())
    while waiting:
        file = waiting.pop()
        origin = repository_path(file.src_uri)
        for path in sorted({resolved(link, origin) for link in LINK.findall(file.content_string)}):
            if (ROOT / path).exists() and files.get_file_from_path(place(path)) is None:
                page = File.generated(config, place(path), content=text_of(path))
                files.append(page)
                waiting += [page] if path.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page whose links lead to pages; what leads nowhere is a warning, an error if strict."""
    origin = repository_path(page.file.src_uri)
    if (ROOT / origin).is_file() and not origin.endswith(".md"):
        return markdown  # code

    def moved(found: re.Match[str]) -> str:
        path = resolved(found[1], origin)
        if not (ROOT / path).exists() and files.get_file_from_path(place(path)) is None:
            log.warning(f"{origin} links to {found[1]}: there is no {path}")
        return posixpath.relpath(place(path), posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(moved, markdown)


def reference() -> dict[str, str]:
    """Path of a page → its Markdown, which mkdocstrings fills with what docstrings say."""
    package = ROOT / "d2m_jax"
    rooms = {room.name: sorted(room.rglob("*.py")) for room in package.iterdir() if room.is_dir()}
    rooms["d2m_jax"] = sorted(package.glob("*.py"))
    pages = {}
    for room, files in rooms.items():
        files = [file for file in files if file.name != "__init__.py"]
        if room == "weights":  # what torch's users are given imports torch
            files = [file for file in files if file.parent.name != "torch_module"]
        if files:
            modules = {file.relative_to(ROOT).as_posix(): file for file in files}
            rows = [f"- `{name}`: {first_words(file)}" for name, file in modules.items()]
            parts = [f"::: {name.removesuffix('.py').replace('/', '.')}" for name in modules]
            head = "# " + ("The rest of the package" if room == "d2m_jax" else f"`{room}`")
            pages[f"reference/{room}.md"] = "\n\n".join([head, "\n".join(rows), *parts])
    return pages


def first_words(file: Path) -> str:
    """The first paragraph of a module's docstring, in one line."""
    said = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(said.split("\n\n")[0].split())


def resolved(link: str, origin: str) -> str:
    """What a link in a file of the repository leads to, from the repository's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def place(path: str) -> str:
    """Where the site has a file of the repository."""
    if path.startswith("docs/") and not (ROOT / path).is_dir():
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def repository_path(place: str) -> str:
    """The other way."""
    if not place.startswith("repository/"):
        return f"docs/{place}"
    path = place.removeprefix("repository/")
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def text_of(path: str) -> str:
    """The page of a file, or of a folder: a list of what is in it."""
    file = ROOT / path
    if file.suffix == ".md":
        return file.read_text()
    if file.is_dir():
        names = sorted(inner.name for inner in file.iterdir())
        return f"# `{path}`\n\n" + "\n".join(f"- [`{n}`]({file.name}/{n})" for n in names)
    if file.suffix == ".ipynb":
        file = file.with_suffix(".py")  # the script that it is made of
    language = LANGUAGES.get(file.suffix, "text")
    return f"# `{path}`\n\n~~~~~~{language}\n{file.read_text()}\n~~~~~~\n"
