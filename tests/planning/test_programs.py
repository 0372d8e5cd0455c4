"""What a plan says to lie on the devices in each phase, beside what a real run has there."""

from collections import defaultdict
from dataclasses import replace
from unittest import mock

import jax
import numpy as np
import pytest

from d2m_jax.config import (
    AutoencoderConfig,
    CacheConfig,
    CLIPConfig,
    FluxConfig,
    GroupsConfig,
    IconsConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PixelsConfig,
    PromptsConfig,
    RunConfig,
    SparsifyConfig,
    StackConfig,
    StageConfig,
    T5Config,
    WordsConfig,
)
from d2m_jax.data.source import with_vocabulary
from d2m_jax.models.flux import initialise
from d2m_jax.planning.hardware import parse
from d2m_jax.planning.plan import Phase, device_bytes, plan, table
from d2m_jax.planning.programs import ENCODERS, RESTACKED, calibration, lower
from d2m_jax.sampling import pipeline
from d2m_jax.sharding import make_mesh, replicated
from d2m_jax.sparsification import importance, left_out
from d2m_jax.training import run
from d2m_jax.training.step import Step
from d2m_jax.weights.directory import model_directory

TRANSFORMER = FluxConfig(
    in_channels=192, vec_in_dim=32, context_in_dim=32, hidden_size=64, num_heads=2,
    axes_dim=(8, 12, 12), guidance_embed=False, double=(StackConfig(2),), single=(StackConfig(3),),
)  # fmt: skip
TEACHER = ModelConfig(TRANSFORMER, WordsConfig(dim=32), PixelsConfig(32, 32, 8), sample_steps=1)
STAGE = StageConfig(
    steps=2, batch_size=16, evaluate_every=2, checkpoint_every=2, sample_every=2,
    optimizer=OptimizerConfig(warmup=1, accumulate=2, ema=0.9),
)  # fmt: skip
GROUPS = GroupsConfig(keep_double=2, keep_single=1, single_blocks=2, single_active=1)
CONFIG = RunConfig(
    name="planned",
    teacher="teacher",
    data=IconsConfig(task="scenes", pictograms=48),
    sparsify=SparsifyConfig(moe=MoEConfig(experts=4, top_k=1), batches=2, batch_size=16, tokens=64),
    stages={"mob": replace(STAGE, train=("single.1.*",), groups=GROUPS)},
    mesh=MeshConfig(),
    held_out_batches=3,
    sampled_prompts=2,
)


class Recorded:
    """A compiled program; `tell` is called before it is."""

    def __init__(self, program, tell):
        self.program, self.tell = program, tell

    def __call__(self, *args, **kwargs):
        self.tell()
        return self.program(*args, **kwargs)

    def lower(self, *args, **kwargs):
        return self.program.lower(*args, **kwargs)


def bytes_since(before):
    """Of the arrays that live now, without those that other tests left."""
    known = {id(a) for a in before}
    return device_bytes([a for a in jax.live_arrays() if id(a) not in known])


def test_what_a_plan_counts_is_what_a_run_holds(tmp_path, monkeypatch, no_look_for_cycles):
    held = defaultdict(list)
    before = jax.live_arrays()

    def teller(phase):
        return lambda: held[phase].append(bytes_since(before))

    def recorded(method, phase):
        return lambda step: Recorded(method(step), teller(phase))

    for module, phase in ((importance, "calibration"), (left_out, "fitting routers")):
        monkeypatch.setattr(module, "measure", Recorded(module.measure, teller(phase)))
    monkeypatch.setattr(Step, "train", recorded(Step.train, "step"))
    monkeypatch.setattr(Step, "evaluate", recorded(Step.evaluate, "validation"))
    monkeypatch.setattr(pipeline, "denoising", Recorded(pipeline.denoising, teller("samples")))
    teacher = with_vocabulary(CONFIG.data, TEACHER)
    model_directory.save(tmp_path / "teacher", teacher, initialise(TRANSFORMER, 0))
    config = replace(CONFIG, teacher=str(tmp_path / "teacher"))
    run.run(config, tmp_path / "run")

    monkeypatch.undo()
    mesh = make_mesh(config.mesh)
    (step,) = lower(config, teacher, mesh)
    planned = {"calibration": calibration(config, teacher, mesh), "step": step}
    planned |= dict(step.others())
    assert planned.keys() == held.keys()
    for phase, one in planned.items():
        # The next batch is made while a program runs, not before.
        parts = {n: t for n, t in {**one.parts, **one.beside}.items() if n != "next batch"}
        wanted = sum(map(device_bytes, parts.values()))
        # Samples are drawn of the teacher first; before the first step there is one batch more.
        assert held[phase][-1] == pytest.approx(wanted, rel=0.01), (phase, held[phase], parts)
    twice, teacher = device_bytes(step.beside[RESTACKED]), device_bytes(step.parts["teacher"])
    assert 0.2 * teacher < twice < teacher
    assert RESTACKED not in planned["calibration"].beside


def test_calibration_of_fewer_blocks_holds_the_whole_teacher_too(
    tmp_path, monkeypatch, no_look_for_cycles
):
    before = jax.live_arrays()

    def measured(*arguments, **keywords):
        raise InterruptedError(bytes_since(before))

    monkeypatch.setattr(importance, "measure", measured)
    teacher = with_vocabulary(CONFIG.data, TEACHER)
    model_directory.save(tmp_path / "teacher", teacher, initialise(TRANSFORMER, 0))
    cut = replace(CONFIG.sparsify, depth_single=2, depth_choice="even")
    config = replace(CONFIG, teacher=str(tmp_path / "teacher"), sparsify=cut)
    config = replace(config, stages={"moe": replace(STAGE, sample_every=0)}, held_out_batches=0)
    with pytest.raises(InterruptedError) as held:
        run.run(config, tmp_path / "run")
    monkeypatch.undo()
    planned = calibration(config, teacher, make_mesh(config.mesh))
    parts = (*planned.parts.values(), *planned.beside.values())
    assert held.value.args[0] == pytest.approx(sum(map(device_bytes, parts)), rel=0.01)
    assert RESTACKED in planned.beside


def test_encoders_count_where_no_cache_spares_them():
    text = PromptsConfig(
        T5Config(d_model=64, d_ff=64, num_layers=1, num_heads=2, vocab_size=100),
        CLIPConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
        ),
        length=8,
    )
    image = AutoencoderConfig(64, 64, (32, 32), 1, latent_channels=4)
    transformer = replace(TRANSFORMER, in_channels=16, context_in_dim=64)
    teacher = ModelConfig(transformer, text, image, sample_steps=1)
    config = replace(CONFIG, data=CacheConfig(path="none"))
    mesh = make_mesh(config.mesh)
    for cached in (True, False):
        data = config.data if cached else CONFIG.data
        given = replace(config, data=data), teacher, mesh
        (stage,) = lower(*given)
        others = dict(stage.others())
        always = {"fitting routers", "validation", "samples", "decoding"}
        encoding = {"encoding captions", "encoding images"}
        assert others.keys() == (always if cached else always | encoding)
        for phase in (calibration(*given), stage, others["validation"]):
            assert (ENCODERS in phase.beside) == (not cached)
        # Pictures need them all; what decodes is an argument.
        loaded = device_bytes(others["samples"].beside[ENCODERS])
        rest = device_bytes(others["decoding"].beside[ENCODERS])
        assert loaded == rest + device_bytes(others["decoding"].parts["autoencoder"]) > rest > 0
        for name in encoding & others.keys():
            one, batch = others[name], others[name].parts["batch"]
            mine = device_bytes({n: t for n, t in one.parts.items() if n != "batch"})
            assert mine + device_bytes(one.beside[ENCODERS]) == loaded > mine > 0
            assert one.beside["optimizer"] and jax.tree.leaves(batch)[0].shape[0] == 16


def test_a_program_of_several_stages_is_compiled_once():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    x = jax.ShapeDtypeStruct((64, 64), np.float32, sharding=replicated(mesh))
    given = parse("h200:1"), mesh, {"x": x}, 1.0
    known, found = {}, []
    for more in (1, 2):  # two stages: steps of their own, the same decoding, other samples
        step = jax.jit(lambda x, more=more: x + more).lower(x)
        decoding = jax.jit(lambda x: jax.numpy.tanh(x) @ x).lower(x)
        samples = jax.jit(lambda x, more=more: (x @ x) * more).lower(x)
        others = {"decoding": decoding, "samples": samples}
        phases = {n: Phase(one, {"x": x}, {"w": [x] * more}) for n, one in others.items()}
        with mock.patch.object(
            jax.stages.Lowered, "compile", autospec=True, side_effect=jax.stages.Lowered.compile
        ) as compiled:
            found.append(plan(step, *given, others=phases, known=known))
            assert compiled.call_count == (3 if more == 1 else 2)
        assert found[-1] == plan(step, *given, others=phases)
    size = 64 * 64 * 4  # what lies beside is counted for each stage
    assert found[1].phases["decoding"] == found[0].phases["decoding"] + size


def test_phases_and_what_lies_beside():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, np.float32, sharding=replicated(mesh))

    x, w = array(256, 256), array(256, 256)
    small = jax.jit(lambda x: x + 1).lower(x)
    large = jax.jit(lambda x, w: jax.numpy.tanh(x @ w) @ w).lower(x, w)
    size = 256 * 256 * 4
    found = plan(
        *(small, parse("h200:1"), mesh, {"x": x}, 1.0),
        beside={"others": [w] * 3},
        others={"large": Phase(large, {"x": x, "w": w}, {"others": [w] * 5})},
    )
    stats = large.compile().memory_analysis()
    assert stats is not None
    needed = stats.temp_size_in_bytes + stats.output_size_in_bytes
    needed += stats.generated_code_size_in_bytes + 7 * size
    assert found.phases["large"] == found.needed == needed > found.phases["step"] >= 5 * size
    assert sum(found.parts.values()) == found.phases["step"]
    assert "peak per phase" in table(found) and "large" in table(found)
