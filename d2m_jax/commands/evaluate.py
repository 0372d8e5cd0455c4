"""Evaluate a model.

{program} account CONFIG_OR_MODEL [--json]   parameters and FLOPs, beside the paper's
{program} icons MODEL … [--prompts N]        scores on the embedded task
{program} export SCORER MODEL --prompts FILE --output FOLDER
                              images in the folders that an official scorer reads
{program} clip MODEL --clip FOLDER --prompts FILE --output FOLDER [--teacher MODEL]
                              CLIP score, and the distance of features from a teacher's images
{program} routing MODEL --output FOLDER [--prompts FILE]
                              where tokens and samples go while it draws: arrays, pictures
{program} blocks CONFIG [--output FOLDER]
                              what each block of a run's teacher is worth, and where groups of a
                              Mixture of Blocks lose least

CONFIG is a Python file with get_config(), MODEL a model directory; `account --help` and so on list
all options.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial

from d2m_jax import command_line  # first, for it tells where there is no environment

# isort: split

from d2m_jax.config import check, suggestion
from d2m_jax.evaluate.arguments import Account, Blocks, Clip, Export, Icons, Routing
from d2m_jax.sampling.options import check_options

EXAMPLE = "icons runs/demo/model teachers/pictograms"


def account(arguments: Sequence[str], program: str) -> None:
    """Count parameters and FLOPs."""
    parsed = command_line.parse(
        Account,
        arguments,
        usage=f"{program} account",
        description="Parameters and FLOPs of a model, beside the paper's figures.",
        example="configs/flux_moe_l.py",
    )
    # Imported once the arguments are right: help and errors need not wait for jax.
    from d2m_jax import api
    from d2m_jax.models import accounting

    counted = api.account(parsed.source, parsed.image_tokens, parsed.text_tokens)
    if parsed.json:
        print(json.dumps(accounting.to_json(parsed.source.stem, counted), indent=1))
    else:
        print(accounting.table(parsed.source.stem, counted))


def icons(arguments: Sequence[str], program: str) -> None:
    """Score models on the embedded task."""
    parsed = command_line.parse(
        Icons,
        arguments,
        usage=f"{program} icons",
        description="Scores of models on the embedded task, in percent, with 95 % confidence.",
        example="runs/demo/model teachers/pictograms",
    )
    check(len(parsed.models) > 0, "MODEL: expected at least one model directory, found none")
    check(parsed.prompts > 0, f"--prompts {parsed.prompts}: expected at least 1")
    options = {"steps": parsed.steps, "top_k": parsed.top_k, "reuse": parsed.reuse}
    check_options(seed=parsed.seed, **options)
    import rich

    from d2m_jax import weights
    from d2m_jax.evaluate import benchmark
    from d2m_jax.evaluate.scores import table, to_json

    for path in parsed.models:  # what is no model is told before the first is scored
        weights.load_config(path)
    scores = {
        str(path): benchmark.evaluate(
            path, parsed.prompts, parsed.seed, parsed.quantize, progress=True, **options
        )
        for path in parsed.models
    }
    if parsed.json:
        print(json.dumps({name: to_json(s) for name, s in scores.items()}, indent=1))
        return
    first = None
    for name, mine in scores.items():
        rich.print(table(name, mine, first))
        first = first or mine


def export(arguments: Sequence[str], program: str) -> None:
    """Draw the images that an official scorer reads."""
    parsed = command_line.parse(
        Export,
        arguments,
        usage=f"{program} export",
        description="Images of a benchmark's prompts in the folders that its official scorer"
        " reads. Killed at any moment and started again, it goes on; many processes share it.",
        example="geneval runs/flux/model --prompts evaluation_metadata.jsonl --output geneval",
    )
    check_options(**parsed.numbers)
    from d2m_jax.evaluate.export import run

    run(parsed)


def clip(arguments: Sequence[str], program: str) -> None:
    """Score a model's images with CLIP."""
    parsed = command_line.parse(
        Clip,
        arguments,
        usage=f"{program} clip",
        description="CLIP score of a model's images of some prompts, and how far they are from a"
        " teacher's of the same noise. Killed at any moment and started again, it goes on; many"
        " processes share it.",
        example="runs/flux/model --clip clip-vit-large-patch14 --prompts prompts.txt"
        " --output clip --teacher models/flux_dev",
    )
    check_options(**parsed.numbers)
    from d2m_jax.evaluate.clip_score import run

    result = run(parsed)
    if result is not None:
        print(json.dumps(result.to_json(), indent=1) if parsed.json else "\n".join(result.lines()))


def routing(arguments: Sequence[str], program: str) -> None:
    """Watch which experts and blocks a model chooses."""
    parsed = command_line.parse(
        Routing,
        arguments,
        usage=f"{program} routing",
        description="Which experts and blocks a model chooses while it draws, by place, time and"
        " group of prompts, and how much each block changes: arrays, pictures, a summary. Many"
        " processes share the prompts.",
        example="runs/demo/model --output routing",
    )
    check_options(**parsed.numbers)
    from d2m_jax.evaluate.watch_run import lines, run

    found = run(parsed)
    if found is not None:
        print("\n".join([*lines(found), f"arrays, pictures and summary.json in {parsed.output}"]))


def blocks(arguments: Sequence[str], program: str) -> None:
    """Measure what each block is worth."""
    parsed = command_line.parse(
        Blocks,
        arguments,
        usage=f"{program} blocks",
        description="What the velocity of a run's teacher loses without each of its blocks, and"
        " what groups of a Mixture of Blocks would lose, wherever they stand, with routers that are"
        " fitted to that: before any training. CONFIG is a run's, a file or the name of one that"
        " comes along.",
        example="configs/icons_moe_s.py --output blocks",
    )
    config = command_line.load_run(parsed.config)
    from d2m_jax.cores import use_cores

    use_cores(config.quick_compilation)
    from d2m_jax.report.block_costs import run

    run(config, parsed)


COMMANDS = {
    "account": account,
    "icons": icons,
    "export": export,
    "clip": clip,
    "routing": routing,
    "blocks": blocks,
}


def main(arguments: Sequence[str], program: str = "evaluate.py") -> None:
    """The command; `program` is what it was called by."""
    if not arguments or arguments[0] in ("-h", "--help"):
        said = (__doc__ or "").format(program=command_line.launched(program))
        print(command_line.with_example(said, program, EXAMPLE))
        return
    name = arguments[0]
    expected = f"expected {' or '.join(COMMANDS)}"
    check(name in COMMANDS, f"{name}: unknown command{suggestion(name, COMMANDS)} ({expected})")
    COMMANDS[name](arguments[1:], program)


def command() -> int:
    """The command as it is installed; its exit code."""
    return command_line.run(partial(main, program="d2m-evaluate"), sys.argv[1:])
