"""A finished run, tiny and untrained, as training leaves it."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from d2m_jax import weights
from d2m_jax.config import (
    FluxConfig,
    IconsConfig,
    ModelConfig,
    MoEConfig,
    PixelsConfig,
    RunConfig,
    SparsifyConfig,
    StackConfig,
    StageConfig,
    StudentConfig,
    WordsConfig,
    to_json,
)
from d2m_jax.data import icons
from d2m_jax.models import experts
from d2m_jax.models.flux import abstract
from tests.seed import generator

DATA = IconsConfig(pictograms=48)
IMAGE = PixelsConfig(32, 32, 16)
SECONDS_PER_STEP = {"pruned": 0.1, "paper": 0.2, "fitted": 0.5}


def model(ffn="dense", mlp_ratio=4.0, blocks=1, **others) -> ModelConfig:
    """A teacher or a student of it; with `blocks` = 2 its single blocks are one group."""
    transformer = FluxConfig(
        in_channels=768,
        vec_in_dim=16,
        context_in_dim=16,
        hidden_size=32,
        num_heads=2,
        axes_dim=(4, 6, 6),
        guidance_embed=False,
        double=(StackConfig(1, ffn=ffn, mlp_ratio=mlp_ratio),),
        single=(StackConfig(2 // blocks, blocks, 1, ffn, mlp_ratio),),
        moe=replace(MoEConfig(experts=4, top_k=2), **others),
    )
    words = WordsConfig(dim=16, vocabulary=icons.vocabulary(DATA))
    return ModelConfig(transformer, words, IMAGE, sample_steps=2)


def parameters(config: ModelConfig, seed: int) -> dict:
    """Random everywhere, so that models differ in what they answer, and no program is compiled."""
    rng = generator(seed)
    shapes = abstract(config.transformer)
    return jax.tree.map(lambda a: 0.2 * rng.normal(size=a.shape).astype(a.dtype), shapes)


def stages(**steps: int) -> dict[str, StageConfig]:
    return {name: StageConfig(steps=count, batch_size=32) for name, count in steps.items()}


def leave(directory: Path, name: str, models: dict, seed: int, steps: dict) -> None:
    """What a training leaves of a student."""
    lines = []
    for stage, config in models.items():
        weights.save(directory / "models" / stage, config, parameters(config, seed))
        for step in range(0, steps[stage].steps + 1, 10):
            line = {"step": step, "stage": stage, "loss": 2 / (step + 1), "output": 1 / (step + 1)}
            line["validation_output"] = 1.1 / (step + 1)
            if step:
                line["seconds"] = step * SECONDS_PER_STEP[name]
            lines.append(json.dumps(line) + "\n")
    (directory / "metrics.jsonl").write_text("".join(lines))


@pytest.fixture(autouse=True)
def plain_experts(monkeypatch):
    """Nothing here depends on how experts are computed, and this way compiles soonest."""
    monkeypatch.setattr(experts, "asked", lambda: "reference")


@pytest.fixture
def make_run(tmp_path):
    """Makes a run of a pruned rival, one by the paper's stages, and the main student `fitted`; of
    the rivals those asked for."""

    def make(*asked: str) -> Path:
        dense, pruned, moe = model(), model(mlp_ratio=1.5), model("moe")
        weights.save(tmp_path / "teacher", dense, parameters(dense, 0))
        paper = {**stages(shared=10, moe=10)}
        paper["shared"] = replace(paper["shared"], top_k=0)
        rivals = {
            "pruned": StudentConfig(SparsifyConfig(method="prune"), stages(retrain=20, longer=10)),
            "paper": StudentConfig(SparsifyConfig(), paper),
        }
        rivals = {name: rival for name, rival in rivals.items() if name in (asked or rivals)}
        config = RunConfig(
            name="fitted",
            teacher=str(tmp_path / "teacher"),
            data=DATA,
            stages=stages(moe=20, mob=20),
            rivals=rivals,
            evaluate_prompts=12,
            sweep_top_k=(0,),
            held_out_batches=1,
        )
        directory = tmp_path / "run"
        for name, student in rivals.items():
            models = dict.fromkeys(student.stages, pruned if name == "pruned" else moe)
            leave(directory / "rivals" / name, name, models, len(name), student.stages)
        leave(directory, "fitted", {"moe": moe, "mob": model("moe", blocks=2)}, 9, config.stages)
        (directory / "config.json").write_text(json.dumps(to_json(config)))
        return directory

    return make
