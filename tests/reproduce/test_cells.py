"""Two cells, tiny, from nothing to the page; and started again."""

import json
import time
from dataclasses import replace

import pytest

from d2m_jax import weights
from d2m_jax.config import ConfigError, RunConfig, SparsifyConfig
from d2m_jax.models import experts
from d2m_jax.reproduce import all_cells
from d2m_jax.reproduce.all_cells import chosen, make
from d2m_jax.reproduce.cells import Cells, unique
from d2m_jax.reproduce.paper_tables import TABLES
from d2m_jax.reproduce.recipe import Recipe
from d2m_jax.training import run
from tests.report.conftest import DATA, model, parameters, stages


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(experts, "asked", lambda: "reference")
    monkeypatch.setattr("d2m_jax.reproduce.cells.PROBE_STEPS", 4)
    # The suite's own folder of programs stays.
    monkeypatch.setattr(all_cells, "_keep_programs", lambda folder: None)
    dense = model()
    weights.save(tmp_path / "teacher", dense, parameters(dense, 0))
    cut = SparsifyConfig(batches=1, batch_size=8, tokens=32)
    made = stages(moe=4)
    base = RunConfig(
        name="base",
        teacher=str(tmp_path / "teacher"),
        data=DATA,
        sparsify=cut,
        stages={"moe": replace(made["moe"], batch_size=8, remat=False, log_every=1)},
        evaluate_prompts=12,
        held_out_batches=4,
    )
    return Recipe(base, dense.transformer, 4)


def test_cells_are_made_once(recipe, tmp_path, monkeypatch, capsys):
    table = replace(TABLES["mlp"](recipe), name="main")  # of which pictures are drawn
    folder = tmp_path / "out"
    make(recipe, [table], folder, 1, ["narrow_1.5"], None, "the command")
    said = capsys.readouterr().out
    assert "main: 1 cells × 1 seeds of 4 steps, 0 there" in said and "in all 1 cells" in said
    found = json.loads((folder / "reproduce.json").read_text())["tables"]["main"]
    assert [cell["name"] for cell in found] == ["narrow_1.5"]
    result = found[0]["seeds"]["0"]
    assert result["steps"] == 4 and result["examples"] == 32 and result["errors"]["seen"] > 0
    assert result["milliseconds"][1] > 0 and "seen" in result["scores"]
    html = (folder / "reproduce.html").read_text()
    assert "the command" in html and "Error while training" in html and "Samples" in html
    places = Cells(recipe, folder)
    place = places.place(table.cells[0], 0)
    assert {path.name for path in (place / "models").iterdir()} == {"retrain"}
    assert not (place / "checkpoints").exists()

    # Again, nothing trains; nor does anything begin that the budget does not hold.
    monkeypatch.setattr(run, "run", lambda *arguments: pytest.fail("trained again"))
    make(recipe, [table], folder, 1, ["narrow_1.5"], None, "again")
    assert "1 there, about 0 s" in capsys.readouterr().out
    make(recipe, [table], folder, 2, ["narrow_1.5"], time.monotonic() + 1e-3, "little time")
    make(recipe, [table], folder, 2, [], time.monotonic() - 1, "no time")
    again = json.loads((folder / "reproduce.json").read_text())["tables"]["main"]
    assert again[0]["seeds"] == found[0]["seeds"]
    assert [len(cell["seeds"]) for cell in again] == [
        1,
        1,
        0,
        0,
        0,
        0,
    ]  # the second told what cells cost
    assert "not run" in capsys.readouterr().out


def test_equal_settings_are_one_cell(recipe, tmp_path):
    cells = Cells(recipe, tmp_path)
    mlp, topk = TABLES["mlp"](recipe), TABLES["topk"](recipe)
    main = {cell.name: cell for cell in TABLES["starts"](recipe).cells}
    same = next(cell for cell in mlp.cells if cell.name == "moe_1.5")
    assert cells.place(main["fitted"], 0) == cells.place(same, 0)
    assert cells.place(main["fitted"], 0) != cells.place(same, 1)
    assert len(unique([(main["fitted"], 0), (same, 0), (main["rank"], 0)], cells)) == 2
    # Other numbers of experts are measured in the folder of one training.
    fixed = [cell for cell in topk.cells if cell.name.startswith("fixed")]
    assert len({cells.place(cell, 0) for cell in fixed}) == 1
    assert len(unique([(cell, 0) for cell in fixed], cells)) == len(fixed)
    costs = all_cells.Costs(overhead=10.0, flops=1e9)
    first, *others = cells.estimates([(cell, 0) for cell in fixed], costs)
    assert first > 10 and set(others) == {5.0}


def test_cells_by_name_bring_what_they_are_compared_with(recipe):
    table = TABLES["mlp"](recipe)
    (left,) = chosen([table, TABLES["starts"](recipe)], ["moe_2"])
    assert [cell.name for cell in left.cells] == ["narrow_2", "moe_2"]
    with pytest.raises(ConfigError, match=r"--cells moe_3: no cell, did you mean moe_2\?"):
        chosen([table], ["moe_3"])
