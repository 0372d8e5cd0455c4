"""From the pictograms teacher to MoE with a Mixture of Blocks, beside two pruned rivals.

    python train.py configs/icons_moe_s.py --run_dir runs/demo        (or: make demo)

1S24E4A: a shared expert of a quarter of the FFN and 4 of 24 normal experts, 37.5 % of the FFN per
token; the paper has 2 of 12, twice as wide, which lose to these (docs/recipe.md). The student "moe"
is that alone. The main one has a group too, of the first two of the 6 single blocks, of which one
runs; experts and group train together, in one stage. The rival of "moe" is pruned to the 37.5 % of
neurons that matter most, that of the main one to 5 single blocks as well; all train on the same
batches for the same steps.
"""

from dataclasses import replace

from d2m_jax.config import (
    GroupsConfig,
    IconsConfig,
    LossConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    SparsifyConfig,
    StageConfig,
    StudentConfig,
)

STEPS = 200
LONGER = 50  # more of the rival's, whose steps take less time

BLOCKS = ("double.*", "single.*")  # everything but the embedders and the last layer

# Factors on the rate, the best of a few for either (docs/decisions.md): what was cut has the most
# to learn, a normal expert sees one token in six, and a gate or router that is fitted is right from
# the start.
PRUNED = {"*mlp.*": 4.0}
FITTED = {"*.shared.*": 2.0, "*.experts.*": 4.0, "*.gate.*": 0.1}
MIXED = FITTED | {"*.router.*": 0.1}
# The paper's experts, with which docs/recipe.md compared recipes.
TWELVE = SparsifyConfig(deal="clustered", gate="fitted")
# Where a group loses least (python evaluate.py blocks configs/icons_moe_s.py).
GROUPS = GroupsConfig(keep_double=1, keep_last_single=4, single_blocks=2, single_active=1)


def stage(steps: int, train: tuple[str, ...] = BLOCKS, **fields) -> StageConfig:
    """A stage of this experiment, on output distillation alone unless `loss` says otherwise."""
    learning_rate, rates = fields.pop("learning_rate", 2e-3), fields.pop("rates", {})
    optimizer = OptimizerConfig(learning_rate=learning_rate, warmup=50, rates=rates)
    return StageConfig(
        steps=steps,
        train=train,
        optimizer=optimizer,
        loss=fields.pop("loss", LossConfig(feature=0.0)),
        remat=False,
        log_every=20,
        evaluate_every=100,
        checkpoint_every=100,
        sample_every=100,
        **fields,
    )


def get_config() -> RunConfig:
    cut = replace(TWELVE, moe=MoEConfig(experts=24, top_k=4))
    loss = LossConfig(feature=0.0, balance=1e-3, block_balance=0.0)
    pruned = {"rates": PRUNED}
    return RunConfig(
        name="icons_moe_s",
        teacher="teachers/pictograms",
        data=IconsConfig(task="scenes"),
        sparsify=cut,
        stages={"joint": stage(STEPS, groups=GROUPS, rates=MIXED, loss=loss)},
        rivals={
            "pruned": StudentConfig(
                SparsifyConfig(method="prune", mlp_ratio=1.5),
                # A second run up to the full rate would undo what the first settled.
                {
                    "retrain": stage(STEPS, **pruned),
                    "longer": stage(LONGER, learning_rate=5e-4, **pruned),
                },
            ),
            "shallow": StudentConfig(
                SparsifyConfig(method="prune", mlp_ratio=1.5, depth_single=5, depth_choice="cost"),
                {"retrain": stage(STEPS, **pruned)},
            ),
            "moe": StudentConfig(cut, {"moe": stage(STEPS, rates=FITTED, loss=loss)}),
        },
        evaluate_prompts=400,
        sweep_top_k=(2, 8),
    )
