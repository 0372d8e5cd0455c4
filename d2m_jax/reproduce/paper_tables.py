"""Which cells make which table, and what the paper says of them. All students of a table train for
the same number of steps, on the same batches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from d2m_jax.config import GroupsConfig, LossConfig, StudentConfig
from d2m_jax.reproduce.recipe import Recipe, mixes


@dataclass(frozen=True)
class Cell:
    """A row of a table: a student, and how it is measured."""

    name: str  # what --cells asks for
    label: str
    student: StudentConfig | None  # None: the teacher
    against: str | None = None  # the name of the cell that it is compared with
    top_k: int | None = None  # normal experts per token while it is measured; None: as trained
    paper: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A comparison of the paper's, in miniature."""

    name: str
    title: str
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()


def paper(
    geneval: float | None = None, dpg: float | None = None, activated: float | None = None
) -> dict[str, str]:
    """The paper's figures for FLUX.1 [dev] as cells of a table."""
    found = {"activated, B": (activated, ".2f"), "GenEval": (geneval, ".3f"), "DPG": (dpg, ".1f")}
    return {name: f"{value:{form}}" for name, (value, form) in found.items() if value is not None}


def main(recipe: Recipe) -> Table:
    """Dense, pruned and sparse at matched activated parameters."""
    left_out = {  # of FLUX.1's 19 and 38 blocks, by our presets (configs/flux_moe_m.py, …)
        "m": (4 / 19, 9 / 38, 2),
        "s": (7 / 19, 15 / 38, 2),
        "xs": (7 / 19, 24 / 38, 3),
    }
    large = recipe.sparse()
    sparse = {
        name: recipe.joint(recipe.placed(recipe.leaving_out(*out)))
        for name, out in left_out.items()
    }
    ratio = recipe.activated
    cells = (
        Cell("dense", "dense, the teacher", None, paper=paper(0.6595, 83.42, 11.90)),
        Cell("narrow_l", f"pruned in width to r = {ratio:g}", recipe.pruned(ratio)),
        Cell(
            "shallow_l",
            "pruned in depth as FLUX.1-lite",
            recipe.as_shallow(large, "change"),
            "narrow_l",
            paper=paper(0.5229, 79.00, 8.16),
        ),
        Cell("moe_l", "MoE-L", large, "narrow_l", paper=paper(0.5702, 81.63, 5.15)),
        Cell("moe_m", "MoE-M", sparse["m"], "narrow_l", paper={"activated, B": "4.0"}),
        Cell("narrow_s", "pruned in width to MoE-S", recipe.as_narrow(sparse["s"])),
        Cell(
            "shallow_s",
            "pruned in depth to MoE-S, as FLUX-mini",
            recipe.as_shallow(sparse["s"], "even"),
            "narrow_s",
            paper=paper(0.3209, 69.34, 3.18),
        ),
        Cell("moe_s", "MoE-S", sparse["s"], "narrow_s", paper=paper(0.4441, 75.61, 3.19)),
        Cell("moe_xs", "MoE-XS", sparse["xs"], "narrow_s", paper=paper(0.4036, 73.66, 2.64)),
    )
    notes = (
        "FLUX.1-lite: the blocks stay that change their streams most; FLUX-mini: few, evenly.",
        "L: rivals with about the activated parameters of MoE-L; S: of MoE-S. MoE-M, S and XS leave"
        " out the shares of blocks that the paper's do, as far as this depth allows; experts and"
        " groups train in one stage.",
    )
    return Table("main", "Dense, pruned and sparse", cells, notes)


def mlp(recipe: Recipe) -> Table:
    """Width pruning against MoE at two activated widths."""
    cells, known = [], {1.5: (paper(0.411, 72.2), paper(0.573, 81.2))}
    for ratio in (1.5, 2.0):
        k, (of_pruned, of_moe) = recipe.top_k(ratio), known.get(ratio, ({}, {}))
        name = f"narrow_{ratio:g}"
        cells += [
            Cell(name, f"pruned, r = {ratio:g}", recipe.pruned(ratio), paper=of_pruned),
            Cell(
                f"moe_{ratio:g}",
                f"MoE, r_a = {ratio:g} (k = {k})",
                recipe.sparse(moe=replace(recipe.moe, top_k=k)),
                name,
                paper=of_moe,
            ),
        ]
    for shared, label in (("magnitude", "by magnitude"), ("random", "at random")):
        student = recipe.pruned(1.5, shared=shared)
        cells.append(Cell(f"narrow_{shared}", f"pruned, r = 1.5, {label}", student, "narrow_1.5"))
    return Table("mlp", "FFNs: pruned or experts", tuple(cells))


def depth(recipe: Recipe) -> Table:
    """Depth pruning against a Mixture of Blocks with as many blocks that run; FFNs stay dense."""
    cells, single = [], recipe.teacher.depth("single")
    double = recipe.teacher.depth("double")
    figures = {0: paper(0.093, 41.6), 1: paper(0.345, 66.9), 3: paper(0.496, 76.5)}
    for share in (12 / 38, 1 / 2):
        # Of the single blocks: the paper leaves out 10 of 19 double ones too, which this may lack.
        groups = recipe.leaving_out(0.0, share)
        if not mixes(groups):
            continue
        pairs = (single - groups.keep_single) // groups.single_blocks
        left = single - pairs
        of = f"{double} + {left} blocks"
        names = [f"{kind}_{left}" for kind in ("change", "even", "cost", "papers", "mob")]
        cells += [
            Cell(names[0], f"pruned as FLUX.1-lite, {of}", recipe.shallow(double, left, "change")),
            Cell(names[1], f"pruned evenly as BK-SDM, {of}", recipe.shallow(double, left, "even")),
            Cell(names[2], f"pruned by cost (ours), {of}", recipe.shallow(double, left, "cost")),
            Cell(names[3], f"MoB as the paper has it, {of} run", recipe.blocks(groups), names[2]),
            Cell(names[4], f"MoB, ours, {of} run", recipe.blocks(recipe.placed(groups)), names[2]),
        ]
        for i, theirs in figures.items():
            cells[i - 5] = replace(cells[i - 5], paper=theirs)
        figures = {}
    notes = (
        "The paper's figures are those of 9 + 26 of 19 + 38 blocks, with experts.",
        "Cost: what the velocity loses without a block. MoB as the paper has it: the last blocks,"
        " with random routers; ours: where they cost least, with routers fitted to that.",
    )
    return Table("depth", "Depth: pruned or chosen", tuple(cells), notes)


def places(recipe: Recipe) -> Table:
    """Groups of blocks beside experts, all in one stage: where they stand, how routers start."""
    last = recipe.leaving_out(7 / 19, 1 / recipe.teacher.depth("single"))
    placed = recipe.placed(last)
    narrow = recipe.pruned(recipe.activated)
    cut = replace(narrow.sparsify, depth_choice="cost", **recipe.running(last))
    rival = replace(narrow, sparsify=cut)
    cells = (
        Cell("narrow_shallow", "pruned in width, and in depth by cost", rival),
        Cell("last_random", "the last blocks, random routers (the paper's)", recipe.joint(last)),
        Cell(
            "last_fitted",
            "the last blocks, fitted routers",
            recipe.joint(replace(last, router="fitted")),
        ),
        Cell(
            "placed_random",
            "where blocks cost least, random routers",
            recipe.joint(replace(placed, router="random")),
        ),
        Cell("placed_fitted", "where blocks cost least, fitted (ours)", recipe.joint(placed)),
    )
    cells = (cells[0], *(replace(cell, against="narrow_shallow") for cell in cells[1:]))
    note = "One block of a pair runs; with as many double ones out as the paper's MoE-S."
    return Table("places", "Groups of blocks: places and routers", cells, (note,))


def starts(recipe: Recipe) -> Table:
    """Initialisations of the experts and of the gate."""
    random: dict[str, Any] = {"deal": "rank", "gate": "random"}
    cells = (
        Cell("rank", "dealt by rank, random gate (the paper's)", recipe.sparse(**random)),
        Cell(
            "no_taylor",
            "shared expert at random, dealt by rank, random gate",
            recipe.sparse(shared="random", **random),
            "rank",
        ),
        Cell("clustered", "clustered, random gate", recipe.sparse(gate="random"), "rank"),
        Cell("gate", "dealt by rank, fitted gate", recipe.sparse(deal="rank"), "rank"),
        Cell("fitted", "clustered, fitted gate (ours)", recipe.sparse(), "rank"),
        Cell(
            "sensitivity",
            "ours, scored by sensitivity",
            recipe.sparse(shared="sensitivity"),
            "rank",
        ),
        Cell(
            "refit",
            "ours, by sensitivity and refitted",
            recipe.sparse(shared="sensitivity", refit="weighted"),
            "rank",
        ),
    )
    note = "The paper loses 0.16 of ImageReward without Taylor scores."
    return Table("starts", "Initialisations", cells, (note,))


def stages(recipe: Recipe) -> Table:
    """Three stages against one."""
    groups = recipe.leaving_out(7 / 19, 15 / 38)
    ours = recipe.placed(groups)
    papers: dict[str, Any] = {"deal": "rank", "gate": "random"}
    cells = (
        Cell(
            "papers_joint",
            "the paper's start, one joint stage",
            recipe.joint(groups, LossConfig(), **papers),
        ),
        Cell(
            "papers_three",
            "the paper's start, three stages, one thing at a time",
            recipe.papers(groups),
            "papers_joint",
        ),
        Cell("joint", "our start, one joint stage", recipe.joint(ours), "papers_joint"),
        Cell("two", "our start, experts and then groups", recipe.sparse(ours), "papers_joint"),
    )
    note = "The paper loses 0.02 of ImageReward by one joint stage."
    return Table("stages", "Stages", cells, (note,))


def experts(recipe: Recipe) -> Table:
    """Few wide experts or many narrow ones, and less that is shared; as much of the FFN activated,
    beside the rival."""
    own, ratio = recipe.moe, recipe.activated
    cells = [Cell("narrow", f"pruned, r = {ratio:g}", recipe.pruned(ratio))]

    def add(name: str, also: str = "", **changes: Any) -> None:
        moe = replace(own, top_k=1, **changes)
        moe = replace(moe, top_k=max(1, recipe.top_k(ratio, moe)))
        label = f"{moe.top_k} of {moe.experts} experts{also}"
        cells.append(Cell(name, label, recipe.sparse(moe=moe), "narrow"))

    for count in (6, 12, 24, 48):
        add(f"experts_{count}", experts=count)
    whole = recipe.teacher.stacks[0].mlp_ratio
    width = (whole - own.shared_ratio) / own.experts  # of one expert
    for share in (1 / 2, 5 / 4):
        shared = share * own.shared_ratio
        also = f", {share:g} × the shared one's width"
        count = round((whole - shared) / width)
        add(f"shared_{share:g}", also, experts=count, shared_ratio=shared)
    return Table("experts", "Wide experts or fine ones", tuple(cells))


def groups(recipe: Recipe) -> Table:
    """The same number of blocks that run, in fewer or in more groups, with features."""
    cells, single = [], recipe.teacher.depth("single")
    for part in (2, 3):  # one of so many runs
        inside = single - single % part
        counts = [g for g in range(1, inside // part + 1) if inside // part % g == 0]
        for count in counts if len(counts) > 1 else ():
            blocks = inside // count
            made = GroupsConfig(
                keep_double=recipe.teacher.depth("double"),
                keep_single=single - inside,
                single_blocks=blocks,
                single_active=blocks // part,
            )
            active, first = blocks // part, f"{counts[0]}_groups_{inside // part}_run"
            name = f"{count}_groups_{inside // part}_run"
            label = f"{count} group{'s' * (count > 1)}, {active} of {blocks} blocks run"
            student = recipe.blocks(made, loss=LossConfig())
            against = None if name == first else first
            cells.append(Cell(name, label, student, against))
            if name == first:
                adjacent = replace(made, choice="adjacent")
                student = recipe.blocks(adjacent, loss=LossConfig())
                name = f"adjacent_{inside // part}_run"
                cells.append(Cell(name, f"{label} that follow one another", student, first))
    note = "FFNs stay dense; every group's output is a point that is compared with the teacher's."
    return Table("groups", "Number of groups", tuple(cells), (note,))


def balance(recipe: Recipe) -> Table:
    """Weights of the balance of experts."""
    cells = []
    for weight in (0.0, 1e-3, 1e-2, 1e-1):
        student = recipe.sparse()
        stage = student.stages["moe"]
        loss = replace(stage.loss, balance=weight)
        student = replace(student, stages={"moe": replace(stage, loss=loss)})
        against = None if weight == 0 else "balance_0"
        cells.append(Cell(f"balance_{weight:g}", f"balance × {weight:g}", student, against))
    return Table("balance", "Balance of experts (Switch Transformer's)", tuple(cells))


def features(recipe: Recipe) -> Table:
    """Block features beside the output, for experts and for the rival."""
    cells = []
    for kind, label in (("narrow", f"pruned, r = {recipe.activated:g}"), ("moe", "MoE")):
        student = recipe.pruned(recipe.activated) if kind == "narrow" else recipe.sparse()
        ((name, stage),) = student.stages.items()
        for weight in (0.0, 0.1, 1.0):
            other = replace(stage, loss=replace(stage.loss, feature=weight))
            cells.append(
                Cell(
                    f"{kind}_{weight:g}",
                    f"{label}, features × {weight:g}",
                    replace(student, stages={name: other}),
                    f"narrow_{weight:g}" if kind == "moe" else "narrow_0" if weight else None,
                )
            )
    note = "Features × 1: as the paper has it, as much as the output's loss."
    return Table("features", "Block features in the loss", tuple(cells), (note,))


def routers(recipe: Recipe) -> Table:
    """Forms of the gate, and what it reads."""
    fitted = {gate: replace(recipe.moe, gate=gate) for gate in ("softmax", "sigmoid")}
    blind = replace(recipe.moe, router_input="unmodulated")
    cells = (
        Cell("renormalised", "softmax over all, renormalised to k", recipe.sparse()),
        *(
            Cell(gate, f"plain {gate}", recipe.sparse(moe=moe), "renormalised")
            for gate, moe in fitted.items()
        ),
        Cell("random", "renormalised, random at the start", recipe.sparse(gate="random")),
        Cell(
            "unmodulated",
            "random at the start, reads unmodulated tokens and the condition",
            recipe.sparse(gate="random", moe=blind),
            "random",
        ),
    )
    return Table("routers", "Routers", cells)


def topk(recipe: Recipe) -> Table:
    """Other numbers of experts per token, nothing retrained."""
    fixed, cells = recipe.sparse(), []
    moe = recipe.moe
    tried = sorted({k for k in (0, 1, 2, 3, 4, 6, 8, 10, 12) if k < moe.experts} | {moe.experts})
    drawn = replace(fixed.stages["moe"], random_top_k=tuple(tried))
    students = {"fixed": fixed, "random": replace(fixed, stages={"moe": drawn})}
    for how, student in students.items():
        for k in tried:
            label = f"k = {k}, trained with " + (
                f"k = {moe.top_k}" if how == "fixed" else "k at random"
            )
            against = f"fixed_{k}" if how == "random" else None
            cells.append(Cell(f"{how}_{k}", label, student, against, top_k=k))
    return Table("topk", "Experts per token, chosen after training", tuple(cells))


TABLES: dict[str, Callable[[Recipe], Table]] = {
    table.__name__: table
    for table in (
        *(main, mlp, experts, depth, places, starts, stages, groups),
        *(features, balance, routers, topk),
    )
}
