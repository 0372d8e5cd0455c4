"""The method in Python: the same bits as a run's, whatever the data are handed over as."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest

import d2m_jax
from d2m_jax import command_line, grid
from d2m_jax.config import (
    CacheConfig,
    ConfigError,
    FluxConfig,
    GroupsConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PixelsConfig,
    RunConfig,
    SparsifyConfig,
    StackConfig,
    StageConfig,
    WordsConfig,
)
from d2m_jax.data import given
from d2m_jax.models.parameters import is_unstacked
from d2m_jax.named_arrays import names
from d2m_jax.sampling.pipeline import Pipeline
from d2m_jax.training.run import run
from tests.models import toy
from tests.seed import generator

PROMPTS = [f"{colour} {thing}" for colour in ("red", "green") for thing in ("heart", "star")]
CONFIG = ModelConfig(
    FluxConfig(
        in_channels=48,
        vec_in_dim=8,
        context_in_dim=8,
        hidden_size=16,
        num_heads=1,
        axes_dim=(4, 6, 6),
        guidance_embed=False,
        double=(StackConfig(1),),
        single=(StackConfig(2),),
    ),
    WordsConfig(dim=8, length=2, vocabulary=("red", "green", "heart", "star")),
    PixelsConfig(8, 8, 4),
    sample_steps=2,
)
CUT = SparsifyConfig(moe=MoEConfig(experts=4, top_k=1), batches=2, batch_size=4, tokens=64)
STAGE = StageConfig(
    steps=4, batch_size=4, log_every=1, evaluate_every=2, checkpoint_every=1, remat=False,
    optimizer=OptimizerConfig(warmup=1),
)  # fmt: skip
MOB = replace(STAGE, steps=2, groups=GroupsConfig(keep_double=1, single_blocks=2))


@pytest.fixture(scope="module")
def teacher():
    return Pipeline(CONFIG, toy.params(CONFIG.transformer))


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "cache"
    return d2m_jax.generate(teacher, PROMPTS, folder, images_per_prompt=4)


@pytest.fixture(scope="module")
def student(teacher, cache):
    return d2m_jax.sparsify(teacher, cache, CUT)


@pytest.fixture(scope="module")
def trained(teacher, cache, student):
    return d2m_jax.distill(student, teacher, cache, STAGE, validation_batches=0)


def assert_same(one, other):
    mine, theirs = names(one.whole()), names(other.whole())
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def differ(one, other):
    mine, theirs = names(one.whole()), names(other.whole())
    return any((np.asarray(mine[name]) != theirs[name]).any() for name in mine)


def images(batches=6, size=4):
    rng = generator()
    for _ in range(batches):
        yield {
            "image": rng.integers(0, 256, (size, 8, 8, 3), np.uint8),
            "text": [PROMPTS[i] for i in rng.integers(0, 4, size)],
        }


def test_ends_in_the_bits_of_a_run(teacher, cache, student, tmp_path):
    teacher.save(tmp_path / "teacher")
    config = RunConfig(
        name="run",
        teacher=str(tmp_path / "teacher"),
        data=cache,
        sparsify=CUT,
        stages={"mob": MOB},
        held_out_batches=1,
    )
    run(config, tmp_path / "run")
    assert_same(student, d2m_jax.load_pipeline(tmp_path / "run/models/start"))
    mob = d2m_jax.distill(student, teacher, cache, MOB, name="mob", validation_batches=1)
    theirs = d2m_jax.load_pipeline(tmp_path / "run/model")
    assert_same(mob, theirs)
    assert mob.config == replace(theirs.config, encoders=None)
    # What a pipeline holds apart for sampling is in stacks again on disk, with its cut.
    assert is_unstacked(theirs.params["single"])
    theirs.save(tmp_path / "again")
    again = d2m_jax.load_pipeline(tmp_path / "again", unrolled=False)
    assert_same(again, mob)
    assert again.cut.keys() == student.cut.keys() and "single.1.mlp" in again.cut
    with pytest.raises(ConfigError, match="again: exists; expected a free name"):
        theirs.save(tmp_path / "again")


def test_a_callback_sees_the_student_as_it_trains(teacher, cache, student):
    seen = []

    def callback(step, metrics, now):
        seen.append((step, metrics["loss"], metrics["validation"], np.asarray(now(PROMPTS[:1]))))

    trained = d2m_jax.distill(
        student, teacher, cache, STAGE, steps=3, every=2, callback=callback, validation_batches=1
    )
    assert [step for step, *_ in seen] == [2, 3]
    np.testing.assert_array_equal(seen[-1][3], trained(PROMPTS[:1]))
    assert (seen[0][3] != seen[1][3]).any()
    assert all(loss > 0 and validation > 0 for _, loss, validation, _ in seen)
    assert differ(trained, student)  # and the first is as it was
    assert_same(student, d2m_jax.sparsify(teacher, cache, CUT))


def test_a_run_directory_is_gone_on_with(teacher, cache, student, trained, tmp_path):
    class Stop(Exception):
        pass

    def stop(step, metrics, now):
        raise Stop

    options = {"run_directory": tmp_path / "run", "validation_batches": 0}
    watched = replace(STAGE, sample_every=2)
    with pytest.raises(Stop):
        d2m_jax.distill(student, teacher, cache, watched, callback=stop, **options)
    assert (tmp_path / "run/metrics.jsonl").is_file()
    steps = []
    again = d2m_jax.distill(
        student, teacher, cache, watched, callback=lambda step, *_: steps.append(step), **options
    )
    assert steps == [2, 4]  # the checkpoint of step 1 is the last before it was stopped
    assert_same(again, trained)


def test_interrupted_it_gives_the_student_as_it_is(teacher, cache, student, capsys):
    def interrupt(step, metrics, now):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    found = d2m_jax.distill(student, teacher, cache, STAGE, steps=50, callback=interrupt)
    assert "distill: interrupted at step" in capsys.readouterr().err
    assert differ(found, student)


def test_batches_are_as_good_as_the_data_they_are_of(teacher, cache, student, trained):
    batches = given.opened(cache, teacher).batches(teacher.encoders.tokenizer, 4)
    assert_same(d2m_jax.distill(student, teacher, batches, STAGE), trained)


def test_images_with_captions_are_encoded(teacher):
    raw = list(images())
    encode = teacher.encoders.encode
    ids = teacher.encoders.tokenizer.ids
    encoded = [encode(batch | {"text": ids(batch["text"])}) for batch in raw]
    mine, theirs = (d2m_jax.sparsify(teacher, batches, CUT) for batches in (raw, encoded))
    assert_same(mine, theirs)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data: expected at least one batch, found none"),
        ([{"image": 1}], r"data: found a batch of image; expected image \(uint8"),
        ([{"image": np.zeros((2, 8, 8, 3)), "text": ["a", "b"]}], "image is float64"),
        ([{"image": np.zeros((2, 8, 8, 3), np.uint8), "text": ["a"]}], "found 1 of text, 2 of im"),
        ("absent", "absent"),
        (list(images(2)), "data: ended after 2 batches, expected one for every step"),
        ([*images(1), *images(1, 3)], "batch 2 has 3 samples of image, text, expected 4 of"),
        (["red hearth"], "unknown word 'hearth'"),
    ],
)
def test_data_that_are_none_are_told(teacher, student, data, message):
    with pytest.raises(ConfigError, match=message):
        d2m_jax.distill(student, teacher, data, STAGE)


def test_of_prompts_the_teacher_samples_once(teacher, monkeypatch):
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments[1])
        return generate(*arguments, **options)

    generate = given.generate
    monkeypatch.setattr(given, "generate", counted)
    prompts = PROMPTS * 2
    student = d2m_jax.sparsify(teacher, prompts, CUT)
    d2m_jax.distill(student, teacher, prompts, STAGE, steps=1, validation_batches=1)
    assert calls == [prompts]
    assert given._sampled[teacher].keys() == {tuple(prompts)}


def test_what_no_stage_can_do_is_told_before_it_trains(teacher, cache, student):
    for stage, message in (
        (replace(STAGE, train=("x",)), r"stages\.distill\.train: 'x' matches no parameter"),
        (replace(STAGE, top_k=9), r"stages\.distill: MoEConfig\.top_k = 9: expected 0 to"),
    ):
        with pytest.raises(ConfigError, match=message):
            d2m_jax.distill(student, teacher, cache, stage)
    quantised = Pipeline(CONFIG, teacher.whole(), quantize="int8")
    with pytest.raises(ConfigError, match="quantize: is for sampling alone"):
        d2m_jax.sparsify(quantised, cache, CUT)


def test_a_seed_that_is_none_is_told_before_the_teacher_samples(teacher, student, monkeypatch):
    monkeypatch.setattr(given, "generate", None)
    for call in (
        lambda seed: d2m_jax.sparsify(teacher, ["red star"], CUT, seed=seed),
        lambda seed: d2m_jax.distill(student, teacher, ["red star"], STAGE, seed=seed),
    ):
        for seed in (-1, 2**32):
            with pytest.raises(ConfigError, match=f"^seed = {seed}: expected a whole number from"):
                call(seed)


def test_from_hub_asks_for_a_repository():
    with pytest.raises(ConfigError, match=r"models/a/b: expected OWNER/NAME of Hugging Face"):
        d2m_jax.from_hub("models/a/b")


def test_pictures_stand_side_by_side(teacher, student):
    found = np.asarray(d2m_jax.compare(PROMPTS[:2], teacher, student, seed=3))
    pairs = [pipe(PROMPTS[:2], seed=3) for pipe in (teacher, student)]
    for column, image in enumerate([pairs[0][0], pairs[1][0]]):
        at = column * (72 + grid.GAP)  # small ones are enlarged, nine times
        cell = found[:72:9, at : at + 72 : 9]
        np.testing.assert_allclose(cell, np.asarray(image) * 255, atol=1.01)


def test_routing_and_account_tell_of_a_pipeline(student, tmp_path):
    found = d2m_jax.routing(student, {"red heart": "hearts", "green star": "stars"}, bins=2)
    assert found.summary["prompts"] == {"hearts": 1, "stars": 1}
    assert str(found).startswith("2 prompts in 2 groups")
    assert found.sums["load"].shape == (4, 2, 2, 4)  # layers, times, groups, experts
    found.save(tmp_path / "routing")
    files = {file.name for file in (tmp_path / "routing").iterdir()}
    assert {"routing.npz", "summary.json", "loads.png"} <= files
    with pytest.raises(ConfigError, match="seed = -1"):
        d2m_jax.routing(student, PROMPTS, seed=-1)

    counted = d2m_jax.account(student)
    held = sum(array.size for array in names(student.whole()).values())
    assert counted.total.parameters == held > counted.total.activated
    assert "one forward of N = 6 tokens (4 image, 2 text)" in str(counted)
    student.save(tmp_path / "student")
    assert d2m_jax.account(tmp_path / "student") == counted
    with pytest.raises(ConfigError, match="teacher = b: found nothing"):
        run_config = RunConfig("a", teacher="b", data=CacheConfig("c"), stages={"d": STAGE})
        d2m_jax.account(run_config)
    with pytest.raises(ConfigError, match="holds a SparsifyConfig, expected the config of a model"):
        (tmp_path / "cut.py").write_text(
            "from d2m_jax.config import SparsifyConfig as get_config  # noqa"
        )
        d2m_jax.account(tmp_path / "cut.py")


def test_the_student_of_a_run_is_counted_before_it_is_made():
    counted = d2m_jax.account("icons_moe_s").total  # as README's table has it
    assert (round(counted.parameters / 1e6, 2), round(counted.activated / 1e6, 2)) == (7.37, 4.23)
    config = command_line.load_config("icons_moe_s")
    fewer = replace(config, stages={"joint": replace(config.stages["joint"], top_k=1)})
    assert d2m_jax.account(fewer).total.activated < counted.activated
