"""Publish a model on the Hugging Face Hub, with a card that says what it is and how to use it.

    python -m d2m_jax.publish MODEL OWNER/NAME

MODEL is a run (its model is taken, its report's numbers are told), a model directory, or a folder
of convert_torch_weights.py --export torch. `hf auth login` or HF_TOKEN says who you are.
d2m_jax.load_pipeline("OWNER/NAME") and every script read what was published.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from d2m_jax import command_line  # first, for it tells where there is no environment

# isort: split
import huggingface_hub
import tyro
from huggingface_hub import CommitOperationAdd, ModelCard, ModelCardData

from d2m_jax.config import (
    ConfigError,
    FluxConfig,
    ModelConfig,
    PromptsConfig,
    check,
    first_line,
    from_json,
    to_json,
)
from d2m_jax.models.accounting import Account, account
from d2m_jax.models.size import amount
from d2m_jax.output import new_file
from d2m_jax.sampling.pipeline import Pipeline
from d2m_jax.weights.directory import model_directory
from d2m_jax.weights.files import hub
from d2m_jax.weights.torch_files.torch_export import MODULE, is_torch_export

CARD = "README.md"
DEV, SCHNELL = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"
DEV_LICENSE = {
    "license": "other",
    "license_name": "flux-1-dev-non-commercial-license",
    "license_link": f"https://huggingface.co/{DEV}/blob/main/LICENSE.md",
}
# What that license asks of everybody who passes such a model on.
DEV_NOTICE = (
    "The FLUX.1 [dev] Model is licensed by Black Forest Labs, Inc. under the FLUX.1 [dev]"
    " Non-Commercial License. Copyright Black Forest Labs, Inc. IN NO EVENT SHALL BLACK FOREST"
    " LABS, INC. BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF"
    " CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH USE OF THIS MODEL."
)


@dataclass(frozen=True)
class Arguments:
    """The arguments of the command."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    repository: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OWNER/NAME")]
    base_model: str | None = None  # OWNER/NAME of the teacher; default, if as wide: FLUX.1's
    license: str | None = None  # such as apache-2.0; default, if as wide: that of FLUX.1's
    private: bool = False  # for its owner alone
    card: Path | None = None  # write the card into this file and publish nothing


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parsed = command_line.parse(
        Arguments,
        arguments,
        usage="python -m d2m_jax.publish",
        description=__doc__ or "",
        example="runs/demo OWNER/NAME --private",
    )
    about = parsed.base_model, parsed.license
    if parsed.card is not None:
        check(not parsed.card.exists(), f"--card {parsed.card}: is there, expected a new file")
        text = str(card(_read(parsed.model), parsed.repository, *about))
        with new_file(parsed.card) as file:
            file.write_text(text)
        print(f"the card is in {parsed.card}; nothing was published")
        return
    print(push_to_hub(parsed.model, parsed.repository, *about, private=parsed.private))


@dataclass(frozen=True)
class Published:
    """What a repository will hold."""

    folder: Path
    config: ModelConfig
    torch: bool  # a program in PyTorch, beside weights of safetensors
    own_encoders: bool  # whether text encoders and autoencoder are in the folder
    report: dict[str, Any] | None = None  # report.json of its run


def push_to_hub(
    source: Pipeline | Path | str,
    repository: str,
    base_model: str | None = None,
    license: str | None = None,
    private: bool = False,
) -> str:
    """Publish a model in one commit, which holds all of it or is not made; the commit's address.

    `source` is a pipeline, or what the command takes; the options are those of the command. The
    repository is made where it is not there; files of the same names are replaced. A path of
    encoders that lie elsewhere is not published. Raises ConfigError for what is no model, a license
    that nobody knows, and where the hub refuses.
    """
    check(
        hub.REPOSITORY.fullmatch(repository) is not None and repository.count("/") == 1,
        f"{repository}: expected OWNER/NAME",
    )
    if isinstance(source, Pipeline):
        with tempfile.TemporaryDirectory(prefix="d2m_jax_") as folder:
            source.save(Path(folder) / "model")
            return push_to_hub(Path(folder) / "model", repository, base_model, license, private)
    found = _read(Path(source))
    text = card(found, repository, base_model, license)
    own = model_directory.ENCODERS if found.own_encoders else None
    config = replace(found.config, encoders=own)
    told = {CARD: str(text), "config.json": json.dumps(to_json(config), indent=1) + "\n"}
    files = sorted(path for path in found.folder.rglob("*") if path.is_file())
    added = {file.relative_to(found.folder).as_posix(): str(file) for file in files}
    added |= {name: content.encode() for name, content in told.items()}
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(name, content) for name, content in added.items()],
            commit_message="A model of d2m_jax",
        )
    except Exception as error:  # of huggingface_hub and of the packages below it
        raise ConfigError(f"{repository}: nothing was published: {_refused(error)}") from None
    return commit.commit_url


def card(
    found: Published,
    repository: str,
    base_model: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """The page of a repository: whose child the model is, its license, its size, what its run
    measured, and how to use it."""
    width = found.config.transformer.hidden_size
    # A student keeps its teacher's width.
    flux = isinstance(found.config.text, PromptsConfig) and width == FluxConfig().hidden_size
    dev = flux and found.config.transformer.guidance_embed
    if flux and base_model is None:
        base_model = DEV if dev else SCHNELL
    check(
        flux or license is not None,
        "--license: expected one, such as apache-2.0, for this model is no child of FLUX.1 (it is"
        f" {width} wide, and FLUX.1 {FluxConfig().hidden_size})",
    )
    licensed: dict[str, Any] = {"license": license or "apache-2.0"}
    if license is None and dev:
        licensed = DEV_LICENSE
    data = ModelCardData(
        **licensed,
        base_model=base_model,
        library_name="d2m_jax",
        pipeline_tag="text-to-image",
        tags=["mixture-of-experts", "diffusion", "pytorch" if found.torch else "jax"],
    )
    parts = [
        f"# {repository.split('/')[1]}",
        _what(found.config, base_model),
        _size(account(found.config)),
        *([_measured(found.report)] if found.report else []),
        "## Use\n\n" + _use(found, repository, base_model),
        *([DEV_NOTICE] if licensed is DEV_LICENSE else []),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _what(config: ModelConfig, base_model: str | None) -> str:
    """Its architecture in a sentence or two."""
    body, moe = config.transformer, config.transformer.moe
    child = f" made of [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    said = [f"A diffusion transformer{child} by d2m_jax."]
    if any(stack.ffn == "moe" for stack in body.stacks):
        said.append(
            "Its FFNs are Mixtures of Experts: every token passes a shared expert and"
            f" {moe.top_k} of {moe.experts} normal experts."
        )
    if any(stack.mixes for stack in body.stacks):
        said.append("Of its groups of blocks every sample passes those that a router chooses.")
    said.append("The method is that of [Dense2MoE](https://arxiv.org/abs/2510.09094).")
    return " ".join(said)


def _size(cost: Account) -> str:
    """A table of what it costs."""
    total = cost.total
    return (
        f"| one forward of {cost.image_tokens} image and {cost.text_tokens} text tokens | |\n"
        "|---|---|\n"
        f"| parameters | {amount(total.parameters)} |\n"
        f"| of them activated per token | {amount(total.activated)} |\n"
        f"| FLOPs | {amount(total.flops, 'G')} |"
    )


def _measured(report: dict[str, Any]) -> str:
    """A table of what the run's report found for the teacher and for the last of its stages."""
    rows = [report["rows"][0], report["rows"][-1]]
    kinds = [kind for kind in rows[1]["error"] if all(kind in row["error"] for row in rows)]
    times = [t for t in rows[1]["milliseconds_per_image"] if t in rows[0]["milliseconds_per_image"]]
    lines = ["| | " + " | ".join(row["name"] for row in rows) + " |", "|---|---|---|"]
    for kind in kinds:
        name = f"distillation error, {kind.replace('_', ' ')}"
        lines.append(
            f"| {name} | " + " | ".join(f"{row['error'][kind]:.4g}" for row in rows) + " |"
        )
    for time in times:
        name = f"milliseconds per image and forward, {time.replace('_', ' of ')}"
        values = (f"{row['milliseconds_per_image'][time]:.4g}" for row in rows)
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    where = ", ".join(str(report[key]) for key in ("device", "date") if report.get(key))
    heading = "## Measured" + (f" ({where})" if where else "")
    return f"{heading}\n\nAfter {rows[1]['steps']:,} steps of distillation:\n\n" + "\n".join(lines)


def _use(found: Published, repository: str, base_model: str | None) -> str:
    """The lines that draw an image."""
    if found.torch:
        return (
            f"`hf download {repository} --local-dir model`; `model/{MODULE.name}` runs"
            " the weights in PyTorch, its first lines say how, and `KEYS.md` names every tensor."
        )
    own = found.own_encoders or not isinstance(found.config.text, PromptsConfig)
    encoders, told = "", ""
    if not own and base_model is not None:
        encoders = f', encoders="{base_model}"'
    elif not own:
        encoders = ", encoders=ENCODERS"
        told = "# ENCODERS: the FluxPipeline that its text encoders and autoencoder are of\n"
    return (
        f"```python\nimport d2m_jax\n\n{told}"
        f'pipe = d2m_jax.load_pipeline("{repository}"{encoders})\n'
        'pipe("a cat on a windowsill", seed=0).pil[0].save("cat.png")\n```'
    )


def _refused(error: Exception) -> str:
    """What happened and what helps, for one line."""
    line = getattr(error, "server_message", None) or first_line(error)
    if hub.status(error) in (401, 403) or isinstance(
        error, huggingface_hub.errors.LocalTokenNotFoundError
    ):
        return f"{hub.LOGIN}, with a token that may write ({line})"
    return line


def _read(source: Path) -> Published:
    """What lies there. ConfigError for what is none of the three."""
    folder, report = source, None
    if (source / "models").is_dir() and (source / "model").is_dir():  # a run
        folder, file = source / "model", source / "report.json"
        report = json.loads(file.read_text()) if file.is_file() else None
    own = (folder / model_directory.ENCODERS).is_dir()
    if is_torch_export(folder):
        file = folder / "config.json"
        config = from_json(ModelConfig, json.loads(file.read_text()), str(file))
        return Published(folder, config, True, own)
    return Published(folder, model_directory.load_config(folder), False, own, report)


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv[1:]))
