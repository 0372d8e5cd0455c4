"""What all cells take from a run's config: teacher, data, rates, budget; and the kinds of students
that tables are made of."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from d2m_jax.config import (
    KINDS,
    FluxConfig,
    GroupsConfig,
    LossConfig,
    MoEConfig,
    RunConfig,
    SparsifyConfig,
    StageConfig,
    StudentConfig,
    check,
)
from d2m_jax.models.accounting import account
from d2m_jax.sparsification.groups import grouped
from d2m_jax.sparsification.student import student_config

BLOCKS = ("double.*", "single.*")  # everything but the embedders and the last layer
SHARED = ("*.shared.*",)
ROUTED = ("*.experts.*", "*.gate.*", "*mlp.scale")
SCALE = {"*mlp.scale": 30.0}  # it starts at 0 and has far to go
ROUTER = {"*.router.*": 0.1}  # fitted, it is right from the start


@dataclass(frozen=True)
class Recipe:
    """A run's config, of which cells are variations; every student trains for `steps` in all."""

    base: RunConfig
    teacher: FluxConfig
    steps: int

    @property
    def _students(self) -> list[StudentConfig]:
        main = StudentConfig(self.base.sparsify, self.base.stages)
        return [main, *self.base.rivals.values()]

    def _stages(self, pruned: bool) -> Iterator[StageConfig]:
        """The base's stages of such a student; a pruned one may be of none."""
        for student in self._students:
            for stage in student.stages.values():
                plain = stage.groups is None and stage.top_k is None
                if plain and student.sparsify.prunes == pruned:
                    yield stage

    @property
    def cut(self) -> SparsifyConfig:
        """How the base cuts an MoE, in our way: experts clustered, gates fitted."""
        moe = next((s.sparsify for s in self._students if s.sparsify.method == "moe"), None)
        check(moe is not None, "reproduce: the config has no student of method = moe")
        assert moe is not None
        return replace(moe, deal="clustered", gate="fitted", routed_scale=1.0)

    @property
    def moe(self) -> MoEConfig:
        """The base's experts."""
        return self.cut.moe

    def top_k(self, ratio: float, moe: MoEConfig | None = None) -> int:
        """How many experts (None: of the base's) make an activated expansion of the FFN."""
        stack, moe = self.teacher.stacks[0], moe or self.moe
        of_one = (stack.mlp_ratio - moe.shared_ratio) / moe.experts
        return min(moe.experts, max(0, round((ratio - moe.shared_ratio) / of_one)))

    @property
    def activated(self) -> float:
        """r_a of the base's MoE."""
        stack, moe = self.teacher.stacks[0], self.moe
        return moe.shared_ratio + moe.top_k * (stack.mlp_ratio - moe.shared_ratio) / moe.experts

    def stage(
        self, steps: int | None = None, *, pruned: bool = False, **fields: Any
    ) -> StageConfig:
        """A stage of so many steps (None: all) with the base's rates for such a student, on its
        losses; all blocks train."""
        steps = self.steps if steps is None else steps
        first = next(self._stages(pruned), None) or next(iter(self.base.stages.values()))
        optimizer = first.optimizer
        if pruned and next(self._stages(True), None) is None:
            optimizer = replace(optimizer, rates={})
        rates = fields.pop("rates", optimizer.rates)
        optimizer = replace(optimizer, warmup=min(optimizer.warmup, steps // 4), rates=rates)
        often = max(1, steps // 4)
        fields = {
            "steps": steps,
            "train": BLOCKS,
            "freeze": (),
            "top_k": None,
            "groups": None,
            "optimizer": optimizer,
            "evaluate_every": often,
            "checkpoint_every": often,
            "sample_every": 0,
        } | fields
        return replace(first, **fields)

    def sparse(self, groups: GroupsConfig | None = None, **changes: Any) -> StudentConfig:
        """An MoE, then with groups of blocks in the last quarter of its steps."""
        cut = replace(self.cut, **changes)
        if groups is None or not mixes(groups):
            return StudentConfig(cut, {"moe": self.stage()})
        last = max(1, self.steps // 4)
        stages = {"moe": self.stage(self.steps - last), "mob": self._mixing(groups, steps=last)}
        return StudentConfig(cut, stages)

    def _mixing(self, groups: GroupsConfig, **fields: Any) -> StageConfig:
        """A stage in which blocks are in groups."""
        stage = self.stage(groups=groups, **fields)
        if groups.router == "random" or not mixes(groups):
            return stage
        rates = {**stage.optimizer.rates, **ROUTER}
        return replace(stage, optimizer=replace(stage.optimizer, rates=rates))

    def pruned(self, ratio: float, **changes: Any) -> StudentConfig:
        """The rival in width, cut as the base cuts its own."""
        own = [s.sparsify for s in self._students if s.sparsify.method == "prune"]
        cut = own[0] if own else replace(self.cut, method="prune")
        cut = replace(cut, mlp_ratio=ratio, depth_double=None, depth_single=None, **changes)
        return StudentConfig(cut, {"retrain": self.stage(pruned=True)})

    def shallow(self, double: int, single: int, choice: str) -> StudentConfig:
        """The rival in depth: so many blocks of either kind, all whole."""
        cut = replace(
            self.cut,
            method="none",
            depth_double=double or None,
            depth_single=single or None,
            depth_choice=choice,
        )
        # Rates of its own are for what was cut: here nothing that is left was.
        return StudentConfig(cut, {"retrain": self.stage(pruned=True, rates={})})

    def blocks(self, groups: GroupsConfig, **fields: Any) -> StudentConfig:
        """Groups of blocks with the teacher's own FFNs, trained as the rival in depth is."""
        stage = self._mixing(groups, pruned=True, rates={}, **fields)
        return StudentConfig(replace(self.cut, method="none"), {"mob": stage})

    def papers(self, groups: GroupsConfig | None) -> StudentConfig:
        """The paper's three stages with its start and its freezing; each trains one thing."""
        quarter = max(1, self.steps // 4)
        everything = LossConfig()  # features and balance too
        mixing = groups is not None and mixes(groups)
        rest = self.steps - quarter * (2 if mixing else 1)
        of_experts = self.stage().optimizer.rates.get("*.experts.*", 1.0)
        stage = partial(self.stage, loss=everything)
        rates = {"*.experts.*": of_experts} | SCALE
        stages = {
            "shared": stage(quarter, train=SHARED, top_k=0, rates={}),
            "moe": stage(rest, train=ROUTED, rates=rates),
        }
        if mixing:
            assert groups is not None
            inside = tuple(
                f"{kind}.{i}.*"
                for kind, i, _, stack in grouped(self.teacher, groups).named_stacks
                if stack.mixes
            )
            stages["mob"] = stage(quarter, train=inside, rates={}, groups=groups)
        cut = replace(self.cut, deal="rank", gate="random", routed_scale=0.0)
        return StudentConfig(cut, stages)

    def joint(
        self, groups: GroupsConfig, loss: LossConfig | None = None, **cut: Any
    ) -> StudentConfig:
        """All at once: experts, gates, groups of blocks."""
        stage = self._mixing(groups, **({} if loss is None else {"loss": loss}))
        return StudentConfig(replace(self.cut, **cut), {"joint": stage})

    # What matches what ------------------------------------------------------------------------

    def leaving_out(self, double: float, single: float, size: int = 2) -> GroupsConfig:
        """Groups of which one block runs, so that about these shares of the blocks stay out: pairs
        of double blocks, and of single ones groups of `size`. As the paper has them they are the
        last blocks, and their routers random."""

        def groups(depth: int, share: float, size: int) -> int:
            return min(round(depth * share / (size - 1)), depth // size)

        there = self.teacher.depth("double"), self.teacher.depth("single")
        pairs, many = groups(there[0], double, 2), groups(there[1], single, size)
        return GroupsConfig(
            keep_double=there[0] - 2 * pairs,
            double_blocks=2 if pairs else 1,
            keep_single=there[1] - size * many,
            single_blocks=size if many else 1,
            router="random",
        )

    def running(self, groups: GroupsConfig) -> dict[str, int | None]:
        """As many blocks as run in these groups: SparsifyConfig's fields of a rival in depth."""
        found = {}
        for kind in KINDS:
            outside, size, active = (
                getattr(groups, f"keep_{kind}") + getattr(groups, f"keep_last_{kind}"),
                getattr(groups, f"{kind}_blocks"),
                getattr(groups, f"{kind}_active"),
            )
            found[f"depth_{kind}"] = (
                outside + (self.teacher.depth(kind) - outside) // size * active or None
            )
        return found

    def placed(self, groups: GroupsConfig) -> GroupsConfig:
        """These groups as we have them: where the base has its own, with fitted routers."""
        of_base = (stage.groups for s in self._students for stage in s.stages.values())
        own = next((g for g in of_base if g is not None and mixes(g)), groups)
        keep = {}
        for kind in KINDS:
            outside = sum(getattr(groups, name) for name in (f"keep_{kind}", f"keep_last_{kind}"))
            first = min(outside, getattr(own, f"keep_{kind}"))
            keep |= {f"keep_{kind}": first, f"keep_last_{kind}": outside - first}
        return replace(groups, router="fitted", **keep)

    def cost(self, student: StudentConfig) -> int:
        """Parameters that a forward activates."""
        config = student_config(self.teacher, student.sparsify)
        for stage in student.stages.values():
            config = config if stage.groups is None else grouped(config, stage.groups)
        return account(config).total.activated

    def as_narrow(self, student: StudentConfig) -> StudentConfig:
        """The rival in width with about as many activated parameters."""
        heads = [i / 16 for i in range(1, round(16 * self.teacher.stacks[0].mlp_ratio))]
        fit = [r for r in heads if (r * self.teacher.hidden_size) % 1 == 0]
        wider = bisect_left(fit, self.cost(student), key=lambda r: self.cost(self.pruned(r)))
        near = fit[max(0, wider - 1) : wider + 1]
        return min(map(self.pruned, near), key=partial(self._distance, student))

    def as_shallow(self, student: StudentConfig, choice: str) -> StudentConfig:
        """The rival in depth with about as many activated parameters, in which both kinds of block
        keep about the same share."""
        double, single = self.teacher.depth("double"), self.teacher.depth("single")
        check(
            single > 1, f"reproduce: the teacher has {single} single blocks, expected two or more"
        )
        candidates = [
            self.shallow(max(1, round(double * left / single)) if double else 0, left, choice)
            for left in range(1, single)
        ]
        return min(candidates, key=partial(self._distance, student))

    def _distance(self, student: StudentConfig, other: StudentConfig) -> int:
        return abs(self.cost(other) - self.cost(student))


def mixes(groups: GroupsConfig) -> bool:
    """Whether any group leaves blocks out."""
    return (
        groups.double_active < groups.double_blocks or groups.single_active < groups.single_blocks
    )


def total_steps(stages: Mapping[str, StageConfig]) -> int:
    """Of all stages."""
    return sum(stage.steps for stage in stages.values())
