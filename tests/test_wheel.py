"""The wheel, built from a copy of the sources and unpacked where nothing of the repository is."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = (
    *("d2m_jax", "configs", "teachers"),
    *("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"),
)
COMMANDS = ("d2m-train", "d2m-convert", "d2m-sample", "d2m-evaluate")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Where a wheel was installed; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignored)
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index", "--quiet"]
    build = ["wheel", ".", "--no-build-isolation", "--wheel-dir", "../dist", *offline]
    subprocess.run([*pip, *build], cwd=folder / "source", check=True)
    (wheel,) = (folder / "dist").iterdir()
    install = ["install", wheel, "--target", folder / "site", *offline]
    subprocess.run([*pip, *install], cwd=folder, check=True)
    return folder / "site"


def run(site, tmp_path, *command):
    """A command that finds the package there alone, run where nothing is."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_holds_the_package_configs_and_teachers(site):
    (wheel,) = (site.parent / "dist").iterdir()
    with zipfile.ZipFile(wheel) as opened:
        held = {name for name in opened.namelist() if name.startswith("d2m_jax/")}
    assert {Path(name).suffix for name in held} >= {".py", ".json", ".typed"}
    expected = {f"d2m_jax/{f.relative_to(ROOT / 'd2m_jax')}" for f in files(ROOT / "d2m_jax")}
    for folder in ("configs", "teachers"):
        expected |= {f"d2m_jax/shipped/{f.relative_to(ROOT)}" for f in files(ROOT / folder)}
    assert held == expected


def files(folder):
    return [f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts]


def test_the_package_is_imported_from_there(site, tmp_path):
    code = "import d2m_jax; print(d2m_jax.__file__, d2m_jax.load_config('icons_moe_s').name)"
    file, name = run(site, tmp_path, "-c", code).split()
    assert Path(file).parent == site / "d2m_jax" and name == "icons_moe_s"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_help(site, tmp_path, command):
    said = run(site, tmp_path, site / "bin" / command, "--help")
    assert command in said and ".py SOURCE" not in said


def test_commands_know_what_comes_with_the_package(site, tmp_path):
    said = run(site, tmp_path, site / "bin/d2m-evaluate", "account", "flux_moe_l")
    assert "5.157 B, paper 5.150 B" in said
    # A config that is made of another.
    said = run(site, tmp_path, site / "bin/d2m-train", "tiny", "--help")
    assert "--stages.mob.steps" in said and "usage: d2m-train tiny" in said
    teacher = next((ROOT / "teachers").glob("*/config.json")).parent
    said = run(site, tmp_path, site / "bin/d2m-evaluate", "account", f"teachers/{teacher.name}")
    assert teacher.name in said and "activated" in said
    code = f"import d2m_jax; print(d2m_jax.load_pipeline('teachers/{teacher.name}'))"
    assert "1 dense" in run(site, tmp_path, "-c", code)
