"""The rules of the house that a program can check: who imports whom, and what a file may hold."""

import ast
import graphlib
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "d2m_jax"
SCRIPTS = ("train", "convert_torch_weights", "sample", "evaluate")
NAMES = ("train", "convert", "sample", "evaluate")  # of the commands that they are
FLOORS = {
    "config": 0,
    "cores": 0,
    "environment": 0,
    "flow": 0,
    "keys": 0,
    "named_arrays": 0,
    "numpy_files": 0,
    "progress": 0,
    "quiet": 0,
    "command_line": 1,
    "hosts": 1,
    "kernels": 1,
    "measured_on": 1,
    "output": 1,
    "sharding": 1,
    "texts": 1,
    "tokenizers": 1,
    "grid": 2,
    "models": 2,
    "weights": 3,
    "sparsification": 3,
    "encoders": 4,
    "sampling": 5,
    "data": 6,  # it encodes images, and draws what a teacher makes of prompts
    "distillation": 6,
    "training": 7,
    "evaluate": 7,
    "planning": 8,
    "report": 8,
    "publish": 8,
    "api": 8,
    "commands": 9,  # parse arguments and call one function
    "reproduce": 9,
    "__init__": 10,  # hands on names to those who use the package
}
# The folders of a room, each above those named before it; what is in no folder is above them all.
FOLDERS = {"weights": ("files", "keys", "lora", "directory", "torch_files")}
# Run as python -m …, beside the scripts at the root.
COMMANDS = {
    *("d2m_jax.data.cache", "d2m_jax.data.generate", "d2m_jax.training.status"),
    "d2m_jax.weights.torch_files.random_flux",
    *("d2m_jax.publish", *(f"d2m_jax.commands.{name}" for name in NAMES)),
    "d2m_jax.evaluate.reproduce",
}
# Of these those that nobody imports, above all floors as the scripts are.
ABOVE = {"d2m_jax.evaluate.reproduce"}
FILES = sorted(PACKAGE.rglob("*.py"))
# Copied into exports for torch's users; nothing here imports it.
SHIPPED = "d2m_jax.weights.torch_files.torch_module.sparse_flux"
MODULES = {
    file.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): file for file in FILES
}


def imported(file: Path) -> set[str]:
    """Dotted names of all modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: expected an absolute import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                ours = full in MODULES or f"{full}.__init__" in MODULES
                found.add(full if ours else node.module)
    return found


def ours(file: Path) -> set[str]:
    """The modules of the package that a file imports, a folder standing for its `__init__`."""
    names = {name for name in imported(file) if name.split(".")[0] == "d2m_jax"}
    return {name if name in MODULES else f"{name}.__init__" for name in names}


def room(module: str) -> str:
    return module.split(".")[1]


def is_below(other: str, module: str) -> bool:
    """Whether a module may import another: of a lower floor, or of its own room one that is in its
    folder, in a folder of that, or in a lower folder."""
    if room(other) != room(module):
        return FLOORS[room(other)] < FLOORS[room(module)]
    if MODULES[other].is_relative_to(MODULES[module].parent):
        return True
    folders = FOLDERS.get(room(module), ())
    places = [folders.index(m.split(".")[2]) for m in (other, module) if m.split(".")[2] in folders]
    return len(places) == 2 and places[0] < places[1]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    assert not ours(MODULES[module]) & ABOVE, f"{module} imports a command"
    if module in ABOVE:
        return
    for other in ours(MODULES[module]) - {module}:
        assert is_below(other, module), f"{module} imports {other}, which is not below it"


def test_every_folder_has_its_place():
    for name, folders in FOLDERS.items():
        assert {p.parent.name for p in (PACKAGE / name).glob("*/__init__.py")} == set(folders)


def test_no_circles():
    graph = {module: ours(file) - {module} for module, file in MODULES.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_every_file_has_a_name_of_its_own():
    """But for the commands, which are called as what they do elsewhere."""
    found = [f.name for f in MODULES.values() if f.parent.name != "commands" and f.name[0] != "_"]
    assert not {name for name in found if found.count(name) > 1}


def test_only_its_benchmark_knows_the_embedded_task():
    """All else goes through the door, data/source.py."""
    task = {"d2m_jax.data.icons", "d2m_jax.data.pictograms", "d2m_jax.evaluate.oracle"}
    knows = {module for module, file in MODULES.items() if ours(file) & task}
    evaluated = {"d2m_jax.evaluate.oracle", "d2m_jax.evaluate.benchmark"}
    assert knows == {"d2m_jax.data.icons", "d2m_jax.data.source"} | evaluated


@pytest.mark.parametrize("module", MODULES)
def test_neither_torch_nor_pickle(module):
    heavy = {"torch", "torchvision", "diffusers", "pickle", "dill", "cloudpickle", "joblib"}
    if module == SHIPPED:
        heavy.remove("torch")
    assert not heavy & {name.split(".")[0] for name in imported(MODULES[module])}
    assert SHIPPED not in imported(MODULES[module])
    assert "allow_pickle=True" not in MODULES[module].read_text()


@pytest.mark.parametrize("module", [m for m in MODULES if m.endswith(".__init__")])
def test_init_defines_nothing(module):
    allowed = {"__all__"}
    if module == "d2m_jax.__init__":
        # Names handed on when they are asked for; to type checkers as imports.
        allowed |= {"__version__", "__getattr__", "__dir__", "_PLACES"}
    body = ast.parse(MODULES[module].read_text()).body
    typed = [node for node in body if isinstance(node, ast.If)]
    assert all(ast.unparse(node.test) == "TYPE_CHECKING" for node in typed)
    inside = [inner for node in typed for inner in node.body]
    for node in [node for node in body if node not in typed] + inside:
        if isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        targets = getattr(node, "targets", [node])
        names = {getattr(target, "id", getattr(target, "name", None)) for target in targets}
        assert names <= allowed, f"{module}, line {node.lineno}: an __init__ only hands on names"


@pytest.mark.parametrize("module", MODULES)
def test_file_is_not_two(module):
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= 430, f"{module} has {lines} lines: at about 400 a file asks to be two"


@pytest.mark.parametrize("module", MODULES)
def test_file_and_its_public_names_say_what_they_are(module):
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree), f"{module}: expected a docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name}: expected a docstring"


@pytest.mark.parametrize("module", MODULES)
def test_every_parameter_says_its_type(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        a = node.args
        named = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        bare = [p.arg for p in named if p.annotation is None and p.arg not in ("self", "cls")]
        assert not bare, f"{module}, line {node.lineno}: {node.name} says no type of {bare}"


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["wandb"]  # imported where a run asks for it
    declared = {re.split(r"[<>=\[;]", line)[0] for line in project["dependencies"] + extra}
    theirs = {"PIL": "pillow", "absl": "absl-py", "orbax": "orbax-checkpoint"}
    theirs["array_record"] = "array-record"
    for module, file in MODULES.items():
        if module == SHIPPED:
            continue
        top = {name.split(".")[0] for name in imported(file)} - sys.stdlib_module_names
        missing = {theirs.get(name, name) for name in top - {"d2m_jax"}} - declared
        assert not missing, f"{module} imports {missing}, which pyproject.toml does not name"


@pytest.mark.parametrize("module", sorted(set(MODULES) - COMMANDS))
def test_only_commands_read_the_command_line(module):
    assert not re.search(r"\bsys\.argv\b|\bargparse\b", MODULES[module].read_text())


def test_array_types_are_checked():
    from d2m_jax.grid import grid

    with pytest.raises(TypeError, match="images"):
        grid(np.zeros((1, 4, 4, 1), np.float32))


def test_importing_the_package_costs_nothing():
    top = {name.split(".")[0] for name in imported(PACKAGE / "__init__.py") if "." not in name}
    assert not top & {"jax", "flax", "numpy"}


def test_every_field_of_a_config_has_help_of_its_own():
    """A comment above a field is taken by --help for those below too that have none."""
    for file in (*PACKAGE.glob("config/*.py"), *PACKAGE.glob("commands/*.py")):
        found = re.search(r"\n    # .*\n    \w+: .*\n    (\w+): [^#\n]*\n", file.read_text())
        assert not found, f"{file.name}: {found and found[1]}: expected a comment beside it"


def test_scripts_are_small():
    for name in SCRIPTS:
        assert len((ROOT / f"{name}.py").read_text().splitlines()) <= 12, f"{name}.py: a command's"
    for name in NAMES:
        lines = (PACKAGE / f"commands/{name}.py").read_text().splitlines()
        assert len(lines) <= 200, f"commands/{name}.py: expected one call"
