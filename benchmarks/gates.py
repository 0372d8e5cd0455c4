"""How well a gate finds the experts that matter, before any training: every FFN of the teacher.

    python benchmarks/gates.py

Energy: the share of the normal experts' squared output norms that the gate's top k holds, beside
what the best k of each token hold. Error: of the cut FFN's output, over the energy of the whole
FFN's, with the gate and with the shared expert alone. On calibration tokens of another seed.
"""

from functools import partial

import jax
import jax.numpy as jnp
import scenes
from timing import described

from d2m_jax.config import SparsifyConfig
from d2m_jax.distillation.stages import noisy_inputs
from d2m_jax.sparsification import importance
from d2m_jax.sparsification.student import make_student
from d2m_jax.weights.directory import model_directory

TEACHER, TOP_K = "teachers/pictograms", 2
RECIPES = (("clustered", "fitted"), ("rank", "fitted"), ("rank", "random"), ("random", "fitted"))


def hidden(x, layer):
    return jax.nn.gelu(x @ layer["kernel"] + layer["bias"], approximate=True)


def judge(ffn: dict, x: jax.Array) -> dict[str, float]:
    experts, shared, gate = ffn["experts"], ffn["shared"], ffn["gate"]
    into = jnp.einsum("td,edf->tef", x, experts["in_kernel"]) + experts["in_bias"]
    out = jnp.einsum("tef,efd->ted", jax.nn.gelu(into, approximate=True), experts["out_kernel"])
    energy = jnp.square(out).sum(-1)
    top = jax.lax.top_k(x @ gate["kernel"] + gate["bias"], TOP_K)[1]
    chosen = jnp.take_along_axis(out, top[:, :, None], 1).sum(1)
    rest = out.sum(1)
    whole = jnp.square(rest + hidden(x, shared["in_layer"]) @ shared["out_layer"]["kernel"]).sum()
    return {
        "energy": jnp.take_along_axis(energy, top, 1).sum() / energy.sum(),
        "best": jax.lax.top_k(energy, TOP_K)[0].sum() / energy.sum(),
        "error": jnp.square(rest - chosen).sum() / whole,
        "error, shared alone": jnp.square(rest).sum() / whole,
    }


def main() -> None:
    described(__doc__).parse_args()
    config, params = model_directory.load(TEACHER)
    noisy = partial(noisy_inputs, config, "uniform")
    calibration = scenes.batches(config, 16)
    others = scenes.batches(config, 8, seed=1)
    given = config.transformer, params, others, noisy, jax.random.key(1), 2048
    tested = importance.calibrate(*given, want=("inputs",), count=8).inputs
    for deal, gate in RECIPES:
        cut = SparsifyConfig(deal=deal, gate=gate)
        _, student, _ = make_student(config, params, cut, calibration, noisy, seed=0)
        for kind, ffns in tested.items():
            for name, inputs in ffns[0].items():
                for block in range(inputs.shape[0]):
                    ffn = jax.tree.map(
                        lambda a, i=block: jnp.asarray(a[i, 0]), student[kind][0]["block"][name]
                    )
                    found = judge(ffn, jnp.asarray(inputs[block, 0], jnp.float32))
                    line = ", ".join(f"{key} {float(value):.2f}" for key, value in found.items())
                    print(f"{deal:9} {gate:7} {kind} {block} {name:8} {line}", flush=True)


if __name__ == "__main__":
    main()
