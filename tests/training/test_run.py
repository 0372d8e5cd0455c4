"""A whole run, tiny: a teacher from scratch, then a student and a rival from it, all stages."""

import json
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from d2m_jax.config import (
    ConfigError,
    FluxConfig,
    GroupsConfig,
    IconsConfig,
    LossConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PixelsConfig,
    RunConfig,
    SparsifyConfig,
    StackConfig,
    StageConfig,
    StudentConfig,
    WordsConfig,
)
from d2m_jax.data import icons
from d2m_jax.grid import GAP
from d2m_jax.named_arrays import names
from d2m_jax.sampling.pipeline import load_pipeline
from d2m_jax.sharding import make_mesh
from d2m_jax.training import run as of_run
from d2m_jax.training import stage as of_stage
from d2m_jax.training.run import run, with_teacher
from d2m_jax.weights.directory import model_directory
from d2m_jax.weights.files import safetensors

TRANSFORMER = FluxConfig(
    in_channels=192,
    vec_in_dim=32,
    context_in_dim=32,
    hidden_size=32,
    num_heads=2,
    axes_dim=(4, 6, 6),
    guidance_embed=False,
    double=(StackConfig(1),),
    single=(StackConfig(3),),
)
STAGE = StageConfig(
    steps=2, batch_size=8, log_every=1, evaluate_every=2, checkpoint_every=1, sample_every=2,
    optimizer=OptimizerConfig(warmup=1), remat=False,
)  # fmt: skip
DATA = IconsConfig(task="scenes", pictograms=48)
CUT = SparsifyConfig(
    moe=MoEConfig(experts=4, top_k=1), batches=2, batch_size=8, tokens=64, modulation_rank=8
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher")
    config = RunConfig(
        name="teacher",
        model=ModelConfig(
            transformer=TRANSFORMER,
            text=WordsConfig(dim=32),
            image=PixelsConfig(32, 32, 8),
            sample_steps=2,
        ),
        data=DATA,
        # Gates start at zero: some real steps, or gradients of a student would be lost in rounding.
        stages={
            "flow": replace(
                STAGE,
                steps=12,
                optimizer=OptimizerConfig(learning_rate=2e-2, warmup=1),
            )
        },
        held_out_batches=1,
    )
    run(config, directory)
    return directory / "model"


def test_weights_of_another_canvas_are_where_a_run_starts(teacher, tmp_path):
    config = RunConfig(
        name="single",
        model=ModelConfig(TRANSFORMER, WordsConfig(dim=32, length=2), PixelsConfig(16, 16, 8)),
        start=str(teacher),
        data=replace(DATA, task="single"),
        stages={"flow": replace(STAGE, sample_every=0)},
        held_out_batches=1,
    )
    run(config, tmp_path / "run")
    start = arrays(tmp_path / "run" / "models" / "start")
    assert start.keys() == arrays(teacher).keys()
    for name, array in arrays(teacher).items():
        np.testing.assert_array_equal(start[name], array)
    assert model_directory.load_config(tmp_path / "run" / "model").image.height == 16

    other = replace(config, model=replace(config.model, transformer=replace(TRANSFORMER, theta=9)))
    with pytest.raises(ConfigError, match=r"its transformer\.theta is 10000, this run's 9"):
        run(other, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"start = absent: found nothing in"):
        run(replace(config, start="absent"), tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"RunConfig\.start = a: expected none beside teacher"):
        student(teacher, start="a")


def student(teacher, **fields) -> RunConfig:
    feature = replace(STAGE, loss=LossConfig(feature=1.0))
    groups = GroupsConfig(keep_double=1, keep_single=1, single_blocks=2, single_active=1)
    stages = {
        "shared": replace(feature, train=("*.shared.*",), top_k=0),
        "moe": replace(feature, train=("double.*", "single.*"), freeze=("*.shared.*",)),
        "mob": replace(feature, train=("single.1.*",), groups=groups),
    }
    shallow = replace(CUT, method="none", modulation_rank=None, depth_single=2)
    config = RunConfig(
        name="student",
        teacher=str(teacher),
        data=DATA,
        sparsify=CUT,
        stages=stages,
        rivals={
            "pruned": StudentConfig(replace(CUT, method="prune"), {"retrain": STAGE}),
            "shallow": StudentConfig(shallow, {"depth": replace(feature, sample_every=0)}),
        },
        held_out_batches=1,
    )
    return replace(config, **fields)


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    directory = tmp_path_factory.mktemp("student")
    run(student(teacher), directory)
    return directory


def arrays(path) -> dict[str, np.ndarray]:
    return {name: np.asarray(a) for name, a in names(model_directory.load(path)[1]).items()}


def test_leaves_a_model_after_every_stage(finished):
    mob, _ = model_directory.load(finished / "model")
    assert mob.transformer.single == (
        StackConfig(1, ffn="moe"),
        StackConfig(1, blocks=2, active=1, ffn="moe"),
    )
    assert mob.text.vocabulary, "a model directory must know its words"
    assert {p.name for p in (finished / "models").iterdir()} == {"start", "shared", "moe", "mob"}
    pruned, _ = model_directory.load(finished / "rivals" / "pruned" / "model")
    assert all(stack.mlp_ratio == 1.5 for stack in pruned.transformer.stacks)
    shallow, _ = model_directory.load(finished / "rivals" / "shallow" / "model")
    assert shallow.transformer.single == (StackConfig(2),)
    cut = model_directory.load_cut(finished / "rivals" / "shallow" / "model", shallow.transformer)
    assert sorted(cut["single.blocks"].tolist()) == [0, 1, 2]
    # Where the student's neurons lie in the teacher goes with every one of them.
    start = model_directory.load_cut(finished / "models" / "start", mob.transformer)
    assert {name.split(".")[-1] for name in start} >= {"img_mlp", "txt_mlp", "mlp"}
    for place in ("models/shared", "models/moe", "models/mob", "model"):
        cut = model_directory.load_cut(finished / place, mob.transformer)
        assert cut.keys() == start.keys()
        assert all((cut[name] == start[name]).all() for name in cut)
    assert model_directory.load_cut(finished / "rivals" / "pruned" / "model", pruned.transformer)


def test_samples_stand_beside_the_teacher_s(teacher, finished):
    with Image.open(finished / "samples" / "mob_000002.png") as file:
        drawn = np.asarray(file)
    config = student(teacher)
    captions = [p.caption for p in icons.prompts(DATA, PixelsConfig(32, 32, 8), 36)]
    images = load_pipeline(teacher)(captions[:2], seed=config.seed)
    scale, cell = 2, 32 * 2 + GAP  # small images are enlarged
    assert drawn.shape[1] == 8 * cell - GAP and drawn.shape[0] == 9 * cell - GAP
    mine = load_pipeline(finished / "model")(captions[:2], seed=config.seed)
    for column, image in enumerate([images[0], mine[0], images[1], mine[1]]):
        found = drawn[: 32 * scale : scale, column * cell : column * cell + 32 * scale : scale]
        np.testing.assert_allclose(found, np.asarray(image) * 255, atol=1.01)


def test_each_stage_trains_what_it_says_and_nothing_else(finished):
    before, after = arrays(finished / "models" / "start"), arrays(finished / "models" / "shared")
    for name in before:
        # A shared expert trains with top_k = 0; whatever else moved would be a leak.
        same = np.array_equal(before[name], after[name])
        assert same == (".shared." not in name), name
    before, after = after, arrays(finished / "models" / "moe")
    for name in before:
        if ".shared." in name or not name.startswith(("double.", "single.")):
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    assert not np.array_equal(
        before["single.0.block.mlp.experts.in_kernel"],
        after["single.0.block.mlp.experts.in_kernel"],
    )


def test_starts_where_it_stopped(teacher, finished, tmp_path, capfd):
    """A run that was cut off after its first stages ends in the same bits as one that was not."""
    config = student(teacher)
    first = replace(config, stages={k: config.stages[k] for k in ("shared", "moe")})
    run(first, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    for name in ("metrics.jsonl", "checkpoints", "model"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    capfd.readouterr()
    run(config, tmp_path / "run")
    told = capfd.readouterr().err
    assert "with so many steps of training: pruned (2), shallow (2), student (6); then" in told
    for line in ("1 of 3: pruned, trained already", "2 of 3: shallow, trained already"):
        assert f"student {line}\n" in told
    assert "student 3 of 3: student\n" in told
    ours, theirs = arrays(tmp_path / "run" / "model"), arrays(finished / "model")
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_students_of_one_cut_are_cut_once(teacher, tmp_path, monkeypatch):
    """They begin with the same bits; with other micro-batches a cut is another one."""
    cut = replace(CUT, method="prune", modulation_rank=None, shared="magnitude")
    short = replace(STAGE, steps=1, sample_every=0, evaluate_every=0)
    parts = replace(short, optimizer=OptimizerConfig(warmup=1, accumulate=2))
    rivals = {
        "first": StudentConfig(cut, {"retrain": short}),
        "parts": StudentConfig(cut, {"retrain": parts}),
    }
    config = student(teacher, sparsify=cut, stages={"other": short}, rivals=rivals)
    cuts, made = [], of_run.cut_student

    def counted(*arguments):
        cuts.append(arguments[2])
        return made(*arguments)

    monkeypatch.setattr(of_run, "cut_student", counted)
    run(config, tmp_path / "run")
    assert cuts == [cut, cut]  # of "first" and of "parts"
    first = arrays(tmp_path / "run" / "rivals" / "first" / "models" / "start")
    main = arrays(tmp_path / "run" / "models" / "start")
    assert first.keys() == main.keys()
    for name, array in main.items():
        np.testing.assert_array_equal(array, first[name], err_msg=name)
    model = model_directory.load_config(tmp_path / "run" / "model").transformer
    assert model_directory.load_cut(tmp_path / "run" / "model", model)


def test_routers_are_fitted_once(teacher, finished, tmp_path, monkeypatch):
    """What is fitted is in the run directory, and a stage that goes on begins with that."""
    config = student(teacher)
    before, params = model_directory.load(finished / "models" / "moe")
    asked = []

    def measured(*arguments, **options):
        asked.append(options["blocks"])
        raise InterruptedError

    monkeypatch.setattr(of_stage, "leave_out", measured)
    work, _ = with_teacher(config, make_mesh(config.mesh))
    given = work, "mob", config.stages["mob"], before, params
    kept = names(of_stage._routers(*given, finished))
    there = safetensors.read(finished / "routers" / "mob.safetensors")
    assert not asked and kept.keys() == there.keys()
    for name, array in kept.items():
        assert isinstance(array, np.ndarray)  # which jit takes
        np.testing.assert_array_equal(array, there[name])
    assert kept["single.1.features.kernel"].shape == (1, 2 * TRANSFORMER.hidden_size, 2)
    trained = arrays(finished / "model")["single.1.router.features.kernel"]
    assert 0 < np.abs(trained - kept["single.1.features.kernel"]).max() < 0.1
    with pytest.raises(InterruptedError):
        of_stage._routers(*given, tmp_path)
    assert asked == [(("single", 1), ("single", 2))]


def test_refuses_the_directory_of_another_run(teacher, finished):
    with pytest.raises(ConfigError, match="seed"):
        run(student(teacher, seed=1), finished)


@pytest.mark.parametrize(
    ("where", "field", "value", "message"),
    [
        ("mob", "train", ("single.2.*",), r"stages\.mob\.train: 'single\.2\.\*' matches no param"),
        ("moe", "freeze", ("*.shard.*",), r"stages\.moe\.freeze: '\*\.shard\.\*' matches.*shared"),
        ("mob", "top_k", 5, r"stages\.mob: MoEConfig\.top_k = 5: expected 0 to experts = 4"),
        (
            "mob",
            "optimizer",
            OptimizerConfig(rates={"gate": 2.0}),
            r"stages\.mob: OptimizerConfig\.rates: 'gate' matches no parameter",
        ),
        (
            "mob",
            "groups",
            GroupsConfig(single_blocks=2, single_active=1),
            r"stages\.mob: GroupsConfig\.single_blocks = 2: expected a divisor of 3",
        ),
        (
            "moe",
            "groups",
            GroupsConfig(single_blocks=3, single_active=1),
            r"stages\.mob: GroupsConfig: the model's blocks are in groups already",
        ),
        ("mob", "batch_size", 7, r"stages\.mob\.batch_size = 7: expected a multiple"),
    ],
)
def test_what_no_stage_can_do_is_told_before_any_trains(
    teacher, tmp_path, where, field, value, message
):
    config = student(teacher)
    good = config.stages
    bad = replace(good[where], **{field: value})
    if field == "batch_size":
        bad = replace(bad, optimizer=OptimizerConfig(accumulate=2))
    with pytest.raises(ConfigError, match=message):
        run(replace(config, stages=good | {where: bad}), tmp_path / "run")
    rival = StudentConfig(config.sparsify, good | {where: bad})
    with pytest.raises(ConfigError, match=message) as told:
        run(replace(config, rivals={"other": rival}), tmp_path / "run")
    assert field == "groups" or str(told.value).startswith(f"rivals.other.stages.{where}")
    # Nothing stands in the way of the config that is right.
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_data_that_tell_no_padding_are_told_before_anything_trains(teacher, tmp_path):
    config = student(teacher)
    good = config.stages
    last = {"mob": replace(good["mob"], count_padding=False)}
    said = "count_padding = False: expected data that tell"
    tells_none = mock.patch.object(icons.Icons, "tells_padding", False)
    with tells_none, pytest.raises(ConfigError, match=said):
        run(replace(config, stages=good | last), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


# Loss and gradient norm of each stage's first step. Renew a number where a change of the method, of
# the data or of its order is meant to change it, and say so in CHANGELOG.md; else a change that was
# to keep the arithmetic did not.
GOLDEN = {
    "flow": [2.018648, 0.3840099],
    "shared": [0.04188663, 0.01834756],
    "moe": [0.01954198, 0.0131808],
    "mob": [0.03098627, 0.0109682],
    "retrain": [0.04408969, 0.165198],
    "depth": [0.006203969, 0.05594661],
}


def test_first_steps_are_as_they_were(finished, teacher):
    found = {}
    for directory in (teacher.parent, finished, *(finished / "rivals").iterdir()):
        for line in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines()):
            if line["step"] == 1:
                found[line["stage"]] = [line["loss"], line["gradient_norm"]]
    # Of machines that round otherwise, after the teacher's twelve steps.
    assert found.keys() == GOLDEN.keys()
    for stage, numbers in GOLDEN.items():
        np.testing.assert_allclose(found[stage], numbers, rtol=2e-2, err_msg=stage)
