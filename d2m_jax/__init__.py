"""Dense2MoE in JAX: from a dense diffusion transformer to a sparse one, and what that bought.

    teacher = d2m_jax.load_pipeline("teachers/pictograms")  # a model directory, a FluxPipeline's
    images = teacher("two green anchor", seed=1)  # float32 [b, h, w, 3] in [0, 1]; images.pil: PIL
    data = d2m_jax.config.IconsConfig()  # or images, a cache, batches, prompts
    student = d2m_jax.sparsify(teacher, data)  # cut into experts
    student = d2m_jax.distill(student, teacher, data, steps=500)  # trained on what the teacher says
    d2m_jax.compare(["two green anchor"], teacher, student)  # one picture, the same noise
    print(d2m_jax.account(student), d2m_jax.routing(student, ["two green anchor"]))
    student.save("models/student")
    d2m_jax.push_to_hub(student, "OWNER/NAME")  # with a card; from_hub reads it

Parts to build with, in an NNX model of your own: MoE, BlockRouter, Flux, lockstep, grouped_matmul,
balance. The scripts train.py, convert_torch_weights.py, sample.py and evaluate.py do the same and
more from the shell; docs/python.md says more.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; the same names as in _PLACES
    from d2m_jax import config as config
    from d2m_jax.api import account as account
    from d2m_jax.api import compare as compare
    from d2m_jax.api import distill as distill
    from d2m_jax.api import from_hub as from_hub
    from d2m_jax.api import generate as generate
    from d2m_jax.api import routing as routing
    from d2m_jax.api import sparsify as sparsify
    from d2m_jax.command_line import load_config as load_config
    from d2m_jax.distillation.lockstep import lockstep as lockstep
    from d2m_jax.distillation.losses import balance as balance
    from d2m_jax.kernels.grouped_matmul import grouped_matmul as grouped_matmul
    from d2m_jax.models.flux import Flux as Flux
    from d2m_jax.models.mob import BlockRouter as BlockRouter
    from d2m_jax.models.moe import MoE as MoE
    from d2m_jax.publish import push_to_hub as push_to_hub
    from d2m_jax.sampling.pipeline import Pipeline as Pipeline
    from d2m_jax.sampling.pipeline import load_pipeline as load_pipeline
    from d2m_jax.weights.torch_files.torch_import import load_model as load_model

__version__ = "0.1.0"
# Where a name is found once it is asked for: importing the package costs nothing.
_PLACES = {
    "BlockRouter": "models.mob.BlockRouter",
    "Flux": "models.flux.Flux",
    "MoE": "models.moe.MoE",
    "Pipeline": "sampling.pipeline.Pipeline",
    "account": "api.account",
    "balance": "distillation.losses.balance",
    "compare": "api.compare",
    "config": "config",
    "distill": "api.distill",
    "from_hub": "api.from_hub",
    "generate": "api.generate",
    "grouped_matmul": "kernels.grouped_matmul.grouped_matmul",
    "load_config": "command_line.load_config",
    "load_model": "weights.torch_files.torch_import.load_model",
    "load_pipeline": "sampling.pipeline.load_pipeline",
    "lockstep": "distillation.lockstep.lockstep",
    "push_to_hub": "publish.push_to_hub",
    "routing": "api.routing",
    "sparsify": "api.sparsify",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    """Names handed on when they are asked for."""
    if name in _PLACES:
        module, _, attribute = f"d2m_jax.{_PLACES[name]}".rpartition(".")
        return getattr(importlib.import_module(module), attribute)
    from d2m_jax.config import suggestion

    near = suggestion(name, __dir__())
    raise AttributeError(f"module 'd2m_jax' has no attribute {name!r}{near}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
