"""The tables that a config gives, by the shapes of their students."""

from dataclasses import replace

import pytest

from configs.icons_moe_s import TWELVE, get_config
from d2m_jax.config import ConfigError, GroupsConfig, RunConfig, StackConfig
from d2m_jax.models.accounting import account
from d2m_jax.reproduce.paper_tables import TABLES
from d2m_jax.reproduce.recipe import Recipe, total_steps
from d2m_jax.sparsification.groups import grouped
from d2m_jax.sparsification.student import student_config
from tests.sparsification.conftest import CONFIG

TEACHER = replace(CONFIG, single=(StackConfig(6),), modulation_rank=2)
BASE = replace(get_config(), teacher="x")
RECIPE = Recipe(BASE, TEACHER, 40)


def transformer(student):
    config = student_config(TEACHER, student.sparsify)
    for stage in student.stages.values():
        config = config if stage.groups is None else grouped(config, stage.groups)
    return config


@pytest.mark.parametrize("name", TABLES)
def test_every_cell_can_be_cut_and_trains_as_long(name):
    table = TABLES[name](RECIPE)
    names = [cell.name for cell in table.cells]
    assert len(set(names)) == len(names) and len(names) >= 4
    for cell in table.cells:
        assert cell.against is None or (cell.against in names and cell.against != cell.name)
        if cell.student is not None:
            assert total_steps(cell.student.stages) == 40, cell.name
            transformer(cell.student)
            RunConfig("a", teacher="x", sparsify=cell.student.sparsify, stages=cell.student.stages)


def test_rivals_of_the_main_table_match_what_they_stand_beside():
    # With the paper's 12 experts: where D is 32 the gates of 24 would weigh too much.
    recipe = replace(RECIPE, base=replace(BASE, sparsify=TWELVE))
    cells = {cell.name: cell.student for cell in TABLES["main"](recipe).cells}
    cost = {name: RECIPE.cost(student) for name, student in cells.items() if student is not None}
    block = account(TEACHER).total.activated / 8
    for letter in "ls":
        assert abs(cost[f"narrow_{letter}"] / cost[f"moe_{letter}"] - 1) < 0.05
        assert abs(cost[f"shallow_{letter}"] - cost[f"moe_{letter}"]) < block
    assert cost["moe_l"] > cost["moe_m"] > cost["moe_s"] > cost["moe_xs"]
    # Of FLUX.1's depths, the presets.
    flux = Recipe(BASE, replace(CONFIG, double=(StackConfig(19),), single=(StackConfig(38),)), 40)
    assert flux.leaving_out(4 / 19, 9 / 38) == GroupsConfig(
        keep_double=11, double_blocks=2, keep_single=20, single_blocks=2, router="random"
    )
    assert flux.leaving_out(7 / 19, 24 / 38, 3).keep_single == 2


def test_equal_depth_and_equal_width():
    depth = {cell.name: transformer(cell.student) for cell in TABLES["depth"](RECIPE).cells}
    for left in (4, 3):
        assert [s.depth for s in depth[f"even_{left}"].single] == [left]
        assert [s.depth for s in depth[f"cost_{left}"].single] == [left]
        for mob in ("papers", "mob"):
            running = sum(s.groups * s.active for s in depth[f"{mob}_{left}"].single)
            assert running == left
    mlp = {cell.name: transformer(cell.student) for cell in TABLES["mlp"](RECIPE).cells}
    assert mlp["moe_2"].moe.top_k == 8 and mlp["narrow_2"].single[0].mlp_ratio == 2
    found = TABLES["groups"](RECIPE).cells
    configs = [transformer(cell.student) for cell in found]
    running = [c.single[-1].groups * c.single[-1].active for c in configs]
    assert running == [3, 3, 3, 2, 2, 2]
    assert [c.mob_choice for c in configs] == ["any", "adjacent", "any"] * 2


def test_groups_stand_where_the_bases_do_with_fitted_routers():
    last = RECIPE.leaving_out(0, 2 / 6)
    assert (last.keep_single, last.keep_last_single, last.router) == (2, 0, "random")
    ours = RECIPE.placed(last)  # the base's begin with the first single block
    assert (ours.keep_single, ours.keep_last_single, ours.router) == (0, 2, "fitted")
    cells = {cell.name: cell.student for cell in TABLES["places"](RECIPE).cells}
    stacks = {name: transformer(student) for name, student in cells.items()}
    assert [s.depth for s in stacks["narrow_shallow"].stacks] == [1, 5]
    for name, single in (("last_fitted", [4, 1]), ("placed_random", [1, 4])):
        assert [s.groups for s in stacks[name].single] == single
        assert sum(s.groups * s.active for s in stacks[name].stacks) == 6
    rates = {
        name: s.stages["joint"].optimizer.rates
        for name, s in cells.items()
        if "_" in name[4:] and "joint" in s.stages
    }
    assert rates["placed_fitted"]["*.router.*"] == 0.1 and "*.router.*" not in rates["last_random"]


def test_rates_are_the_bases():
    recipe, pruned = RECIPE, BASE.rivals["pruned"].stages["retrain"].optimizer
    assert recipe.pruned(1.5).stages["retrain"].optimizer.rates == pruned.rates
    moe = BASE.rivals["moe"].stages["moe"].optimizer
    assert recipe.sparse().stages["moe"].optimizer.rates == moe.rates
    alone = Recipe(replace(BASE, rivals={}), TEACHER, 40)
    assert alone.pruned(1.5).stages["retrain"].optimizer.rates == {}
    with pytest.raises(ConfigError, match="no student of method = moe"):
        cut = replace(BASE.sparsify, method="prune")
        Recipe(replace(BASE, rivals={}, sparsify=cut), TEACHER, 40).sparse()
