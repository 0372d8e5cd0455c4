"""The root scripts as a user meets them: options, help, and bad input told in one line."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2m_jax import command_line, weights
from d2m_jax.config import (
    ConfigError,
    FluxConfig,
    GroupsConfig,
    ModelConfig,
    MoEConfig,
    PixelsConfig,
    RunConfig,
    StackConfig,
    StageConfig,
    StudentConfig,
    WordsConfig,
)
from tests.models import toy
from tests.test_help import COMMANDS

ROOT = Path(__file__).parent.parent
STUDENT = RunConfig(
    name="student",
    teacher="teacher",
    stages={"shared": StageConfig(steps=3), "moe": StageConfig(groups=GroupsConfig())},
    rivals={"pruned": StudentConfig(stages={"all": StageConfig()})},
)


@dataclass(frozen=True)
class Numbers:
    count: int
    shares: tuple[float, ...] = ()
    inner: MoEConfig = field(default_factory=MoEConfig)


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def script(capsys, monkeypatch):
    """Runs a root script in this process."""

    def call(name: str, *arguments: str | Path) -> Done:
        spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, module.__name__, module)  # where tyro looks for comments
        spec.loader.exec_module(module)
        capsys.readouterr()
        try:
            code = command_line.run(module.main, [str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture
def error_of(script):
    """Runs a root script and hands back the one line that it answers bad input with."""

    def call(name: str, *arguments: str | Path) -> str:
        done = script(name, *arguments)
        assert done.returncode == 2, done.stderr
        assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ")
        return done.stderr

    return call


def parse(*arguments: str, kind=RunConfig, default=STUDENT):
    return command_line.parse(
        kind, arguments, usage="train.py", description="Train.", example="--seed 1", default=default
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model directory, untrained."""
    transformer = FluxConfig(
        in_channels=48,
        vec_in_dim=8,
        context_in_dim=8,
        hidden_size=16,
        num_heads=1,
        axes_dim=(4, 6, 6),
        guidance_embed=False,
        double=(StackConfig(1, ffn="moe"),),
        single=(StackConfig(1),),
        moe=MoEConfig(experts=4),
    )
    words = WordsConfig(dim=8, vocabulary=("red", "green", "heart"))
    config = ModelConfig(transformer, words, PixelsConfig(8, 8, 4), sample_steps=2)
    path = tmp_path_factory.mktemp("models") / "tiny"
    weights.save(path, config, toy.params(transformer))
    return path


def test_fields_at_any_depth_can_be_overridden():
    config = parse(
        *("--seed", "7", "--stages.moe.steps", "200", "--stages.moe.groups.single_blocks", "3"),
        *("--rivals.pruned.stages.all.optimizer.learning-rate", "0.5"),
        *("--sparsify.dense_double", "0", "2", "--sparsify.modulation_rank", "8"),
    )
    stage = STUDENT.stages["moe"]
    assert config.seed == 7 and config.stages["shared"] == STUDENT.stages["shared"]
    groups = replace(stage.groups, single_blocks=3)
    assert config.stages["moe"] == replace(stage, steps=200, groups=groups)
    assert config.rivals["pruned"].stages["all"].optimizer.learning_rate == 0.5
    assert config.sparsify.dense_double == (0, 2) and config.sparsify.modulation_rank == 8


def test_without_options_the_config_is_unchanged():
    assert parse() == STUDENT
    dense = RunConfig(name="dense", model=ModelConfig(), stages={"flow": StageConfig()})
    assert parse(default=dense) == dense


def test_stacks_can_be_overridden():
    dense = RunConfig(name="dense", model=ModelConfig(), stages={"flow": StageConfig()})
    config = parse("--model.transformer.double.0.groups", "3", default=dense)
    assert config.model.transformer.double == (StackConfig(3),)
    assert config.model.transformer.single == (StackConfig(38),)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--stages.moe.stepz", "3"],
            r"^--stages.moe.stepz: .*, did you mean --stages.moe.steps\?$",
        ),
        (["--zzzzz=3"], r"^--zzzzz: unknown option$"),
        (["--stages.moe.steps", "abc"], r"^--stages.moe.steps = abc: expected a whole number$"),
        (["--stages.moe.top_k", "x"], r"^--stages.moe.top_k = x: expected a whole number or None$"),
        (["--stages.moe.optimizer.ema", "x"], r"^--stages.moe.optimizer.ema = x: expected a numb"),
        (["--sweep_top_k", "1", "ten"], r"^--sweep_top_k = 1 ten: expected whole numbers$"),
        (["--sparsify.method", "prun"], r"^--sparsify.method = prun: .* one of 'moe', 'prune'"),
        (["--seed"], r"^--seed: found no value, expected one$"),
        (["--quick_compilation", "yes"], r"^yes: no option takes it; .* no value: --NAME, --no_"),
        (["--sparsify.moe.top_k", "13"], r"sparsify.moe.top_k = 13: expected 0 to experts = 12"),
        (["--teacher", "None"], r"expected either teacher .*, found neither"),
    ],
)
def test_bad_options_are_told_in_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value) and "│" not in str(caught.value)


def test_options_without_a_default():
    parsed = parse("--count", "3", "--shares", "0.5", "1", kind=Numbers, default=None)
    assert parsed == Numbers(3, (0.5, 1.0))
    with pytest.raises(ConfigError, match=r"^--count: missing .train.py --help.$"):
        parse(kind=Numbers, default=None)


def test_help_lists_fields_with_their_comments(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert not stopped.value.code
    said = capsys.readouterr().out
    assert "--stages.moe.steps INT" in said and "--rivals.pruned.stages.all.batch_size" in said
    assert "name patterns" in said
    assert max(map(len, said.splitlines())) <= 100


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1", r"bad.py: expected a function get_config\(\), found none"),
        ("def get_config():\n    return nothing", r"bad.py, line 2: NameError: .*'nothing'"),
        ("def get_config(:", r"bad.py, line 1: SyntaxError"),
        (
            "import d2m_jax.config as c\ndef get_config():\n    return c.MoEConfig(experts=0)",
            r"bad.py, line 3: MoEConfig.experts = 0: expected at least 1",
        ),
        (
            "import d2m_jax.config as c\ndef get_config():\n    return c.RunConfig(nam='tiny')",
            r"^bad.py, line 3: RunConfig.nam: unknown field, did you mean name\?$",
        ),
        (
            "import d2m_jax.config as c\ndef get_config():\n    return c.RunConfig(seed=3)",
            r"^bad.py, line 3: RunConfig.name: missing$",
        ),
    ],
)
def test_bad_config_files_are_told_in_one_line(tmp_path, monkeypatch, text, message):
    (tmp_path / "bad.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        command_line.load_config("bad.py")


def test_exit_codes(capsys):
    def fails(error):
        def main(arguments):
            raise error

        return main

    assert command_line.run(lambda arguments: None, []) == 0
    assert command_line.run(fails(ConfigError("a:\n b")), []) == 2
    assert capsys.readouterr().err == "error: a: b\n"
    assert command_line.run(fails(KeyboardInterrupt()), []) == 130
    with pytest.raises(ZeroDivisionError):  # a bug shows where it is
        command_line.run(fails(ZeroDivisionError()), [])


@pytest.mark.parametrize("name", ["train", "sample", "evaluate"])
def test_a_script_exits_with_its_code(name):
    command = [sys.executable, ROOT / f"{name}.py", "--no-such-option"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


LONG = 300 * "a"  # more than any file system takes


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("train", [LONG]),
        ("convert_torch_weights", [LONG, "free"]),
        ("convert_torch_weights", ["teachers/pictograms", LONG]),
        ("sample", [LONG, "--prompt", "red bicycle", "--output", "free"]),
        ("evaluate", ["account", LONG]),
        ("evaluate", ["icons", LONG]),
        ("evaluate", ["blocks", LONG]),
    ],
)
def test_a_name_that_is_too_long(error_of, tmp_path, monkeypatch, name, arguments):
    monkeypatch.chdir(tmp_path)
    assert "File name too long" in error_of(name, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["train", "sample"])
def test_help_whose_reader_has_gone(name):
    """As `--help | head -1`: not a word more."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, ROOT / f"{name}.py", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=120)
    os.close(writer)
    assert done.stderr == b"" and done.returncode in (0, 141)


@pytest.mark.parametrize("command", COMMANDS)
def test_without_an_environment_a_command_says_what_to_do(command):
    started = [sys.executable, "-S", *command.split()[1:], "--help"]  # without site-packages
    done = subprocess.run(started, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert (
        " lacks jax and rich and tyro, expected an environment with d2m_jax: source .venv/bin/act"
        in done.stderr
    )


def test_train_answers_bad_input(script, error_of, tmp_path):
    config = tmp_path / "dense.py"
    config.write_text(
        "from d2m_jax.config import ModelConfig, RunConfig, StageConfig\n"
        "def get_config():\n"
        "    stages = {'flow': StageConfig()}\n"
        "    return RunConfig(name='dense', model=ModelConfig(), stages=stages)\n"
    )
    run_dir = tmp_path / "run"
    said = error_of("train", config, "--run-dir", run_dir, "--stages.flow.stepz", "3")
    assert "--stages.flow.steps" in said
    assert not run_dir.exists()
    assert "found none" in error_of("train")
    assert "found --seed" in error_of("train", "--seed", "3")
    assert "no such file" in error_of("train", tmp_path / "absent.py")
    said = error_of("train", "configs/flux_moe_s.py")
    assert "expected RunConfig; it is for evaluate.py account, configs/flux_distill.py tr" in said
    assert "before all options" in error_of("train", "--run-dir", run_dir, config)
    said = script("train", config, "--help").stdout
    assert "--run_dir" in said and "--stages.flow.steps" in said


def test_account_prints_a_table_and_json(script, model):
    said = script("evaluate", "account", "configs/flux_moe_l.py").stdout
    assert "N = 4173" in said and "5.157 B, paper 5.150 B (+0.1 %)" in said
    done = script("evaluate", "account", model, "--json")
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout)
    assert counted["image_tokens"] == 4 and counted["text_tokens"] == 6
    assert counted["activated"] < counted["parameters"]


def test_evaluate_answers_bad_input(script, error_of, model, tmp_path):
    assert "did you mean account?" in error_of("evaluate", "acount")
    assert "expected a model directory" in error_of("evaluate", "account", tmp_path)
    assert "found none" in error_of("evaluate", "icons")
    assert str(model) in error_of("evaluate", "icons", model)  # its words are of no task
    # All are looked at before the first is scored.
    assert "absent: expected a model" in error_of("evaluate", "icons", model, tmp_path / "absent")
    assert "account CONFIG_OR_MODEL" in script("evaluate", "--help").stdout
    there = "--prompts", tmp_path / "none", "--output", tmp_path / "out"
    assert "did you mean geneval?" in error_of("evaluate", "export", "genevall", model, *there)
    assert "expected geneval's prompts" in error_of("evaluate", "export", "geneval", model, *there)
    said = error_of("evaluate", "clip", model, "--clip", tmp_path, *there, "--seed", "-1")
    assert "seed = -1: expected" in said
    assert "no such file" in error_of("evaluate", "routing", model, *there)


def test_sample_writes_images_and_a_grid(script, model, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffgreen heart\r\n\r\nred\r\n".encode())
    done = script(
        *("sample", model, "--prompt", "red heart", "--prompts", tmp_path / "prompts.txt"),
        *("--height", "8", "--width", "12", "--steps", "1", "--top-k", "1"),
        *("--output", tmp_path / "images"),
    )
    assert done.returncode == 0, done.stderr
    files = sorted(file.name for file in (tmp_path / "images").iterdir())
    assert files == ["0000.png", "0001.png", "0002.png", "grid.png"]
    images = [np.asarray(Image.open(tmp_path / "images" / file)) for file in files[:3]]
    assert [image.shape for image in images] == [(8, 12, 3)] * 3
    assert not np.array_equal(images[0], images[1])


def test_sample_answers_bad_input(error_of, model, tmp_path):
    def error(*arguments):
        return error_of("sample", model, "--output", tmp_path / "new", *arguments)

    assert "found none" in error()
    assert "absent.txt: no such file" in error("--prompts", tmp_path / "absent.txt")
    assert "unknown word 'hearth', did you mean heart?" in error("--prompt", "red hearth")
    assert "top_k = 5: expected 0 to 4" in error("--prompt", "red", "--top-k", "5")
    assert "--steps" in error("--prompt", "red", "--steps", "many")
    said = error("--prompt", "red", "--lora", "a.safetensors")
    assert "--lora: unknown option; merge it into its model first: python convert_torch_w" in said
    assert not (tmp_path / "new").exists()
    assert "--output" in error_of("sample", model, "--prompt", "red")
    (tmp_path / "file").write_text("")
    said = error_of("sample", model, "--prompt", "red", "--output", tmp_path / "file")
    assert "file is a file, expected a folder" in said


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--guidance", "nan", "guidance = nan: expected a number of at least 0"),
        ("--true-cfg", "inf", "true_cfg = inf: expected a number"),
        ("--height", "-64", "height = -64: expected a whole number from 1"),
        ("--batch-size", "-1", "batch_size = -1: expected a whole number of at least 1"),
        ("--tile", "2", "tile = 2: expected a whole number of at least 4"),
        ("--seed", "-1", "seed = -1: expected a whole number from 0"),
    ],
)
def test_options_are_checked_before_a_model_is_opened(error_of, tmp_path, option, value, message):
    said = error_of(
        *("sample", tmp_path / "no_model", "--output", tmp_path, "--prompt", "red", option, value)
    )
    assert message in said
    if option == "--seed":
        assert message in error_of("evaluate", "icons", tmp_path / "no_model", option, value)


def test_a_model_that_needs_no_encoders_says_so(error_of, model, tmp_path):
    said = error_of(
        *("sample", model, "--output", tmp_path / "new", "--prompt", "red", "--encoders", model)
    )
    assert "reads words and draws pixels by itself, expected none" in said


@pytest.mark.parametrize("name", ["a.safetensors", "A.PT", "a.png"])
def test_folders_do_not_get_names_of_files(error_of, tmp_path, name):
    new = tmp_path / name
    for arguments in (
        ("sample", "teachers/pictograms", "--prompt", "red anchor", "--output", new),
        ("train", "configs/tiny.py", "--run-dir", new),
        ("convert_torch_weights", "teachers/pictograms", new),
    ):
        assert f"{name}: would be a" in error_of(*arguments)
    assert not new.exists()


NO_NUMBER = "JAX_NUM_CPU_DEVICES=abc", 'Invalid value "abc" for JAX flag jax_num_cpu_devices'


@pytest.mark.parametrize(
    ("name", "variable", "message"),
    [
        ("sample", *NO_NUMBER),
        ("train", *NO_NUMBER),
        ("evaluate", *NO_NUMBER),
        ("convert_torch_weights", *NO_NUMBER),
        ("sample", "JAX_PLATFORMS=gpuu", "Unable to initialize backend 'gpuu'"),
    ],
)
def test_an_environment_in_which_jax_cannot_start(tmp_path, name, variable, message):
    arguments = {
        "sample": ["teachers/pictograms", "--prompt", "red", "--output", tmp_path / "images"],
        "train": ["configs/tiny.py", "--run-dir", tmp_path / "run"],
        "evaluate": ["icons", "teachers/pictograms"],
        "convert_torch_weights": ["teachers/pictograms", tmp_path / "model"],
    }[name]
    done = subprocess.run(
        [sys.executable, f"{name}.py", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | dict([variable.split("=")]),
        timeout=120,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr
