"""One forward of FLUX.1 [dev] and of the paper's sparse sizes, against diffusers' transformer.

    python benchmarks/transformer.py --output transformer.json

On a GPU: full size, bfloat16, 1024² and 512² pixels, torch eager and compiled, with PyTorch's best
attention. On a CPU: --dim 512, a quarter of the depth, float32, torch eager. Weights are random,
routing is not: MoE-L runs with balanced, random and skewed loads, the others with random ones.

Torch's and our dense model take turns, then every sparse one and our dense one; medians, and the
middle half of the rounds.
`of dense` is time over our dense one's within the same rounds, `FLOPs` the same for work, `of
torch` time over the quicker torch's, `of peak` work per second over that of a large matmul. On a
CPU `cores` is what all cores spent, which other work on the machine hardly moves.
"""

import math
import os
from functools import partial

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
from models import LOADS, NAMES, config_of, inputs, random_params, routing
from timing import Times, finish, limits, measure, on_cpu, parser, table, usual_dtype

from d2m_jax.config import FluxConfig
from d2m_jax.models.accounting import account
from d2m_jax.models.flux import model_of
from d2m_jax.models.parameters import unstacked

DENSE = NAMES[0]


def ours(config: FluxConfig, dtype, arguments: tuple):
    """A call of our model, compiled while the routing in force holds."""
    params = random_params(config, dtype)
    if not on_cpu():  # as load_pipeline does on a GPU
        params = unstacked(params, release=True)

    @jax.jit  # anew for every call: a program that was traced before knows another routing
    def forward(params, arguments):
        return model_of(config, params, dtype)(*arguments)

    program = forward.lower(params, arguments).compile()
    return lambda: program(params, arguments)


def theirs(config: FluxConfig, arguments: tuple):
    """Calls by name of diffusers' FluxTransformer2DModel of the same shape on the same device."""
    import torch
    from diffusers import FluxTransformer2DModel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    cuda = torch.cuda.is_available() and not on_cpu()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = FluxTransformer2DModel(
            in_channels=config.in_channels,
            num_layers=config.depth("double"),
            num_single_layers=config.depth("single"),
            attention_head_dim=config.hidden_size // config.num_heads,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_in_dim,
            pooled_projection_dim=config.vec_in_dim,
            guidance_embeds=config.guidance_embed,
            axes_dims_rope=config.axes_dim,
        ).eval()
    torch.set_default_dtype(torch.float32)
    names = ("hidden_states", "img_ids", "encoder_hidden_states", "txt_ids", "timestep")
    names += ("pooled_projections", "guidance")
    values = {}
    for name, value in zip(names, arguments, strict=True):
        tensor = torch.from_numpy(jax.device_get(value.astype("float32")).copy()).to(device)
        values[name] = tensor[0] if "ids" in name else tensor.to(dtype)
    best = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

    def call(run):
        with torch.no_grad(), sdpa_kernel(best, set_priority=True):
            run(**values, return_dict=False)
        if cuda:
            torch.cuda.synchronize()

    calls = {"torch eager": partial(call, model)}
    if cuda:
        compiled = torch.compile(model, mode="max-autotune-no-cudagraphs")
        calls["torch compiled"] = partial(call, compiled)
    return calls


def compare(options, image_tokens: int, peak: float):
    """Rows of one image size."""
    dtype, text = usual_dtype(), options.text_tokens
    dense = config_of(DENSE, options.dim, options.divide)
    arguments = inputs(dense, image_tokens, text, dtype)
    work = partial(account, image_tokens=image_tokens, text_tokens=text)
    rivals = theirs(dense, arguments) if options.torch else {}
    base = {("ours", DENSE): ours(dense, dtype, arguments)}
    calls = base | {(name, DENSE): call for name, call in rivals.items()}
    times = measure(calls, options.rounds)
    # Ours over the quicker of torch's, from the rounds in which they took turns.
    torch = min(
        (taken.median for (by, _), taken in times.items() if by != "ours"), default=math.nan
    )
    dense_of_torch = times["ours", DENSE].median / torch

    def row(who: str, name: str, load: str, taken: Times, reference: Times) -> dict:
        flops = work(config_of(name, options.dim, options.divide)).total.flops
        return {
            "tokens": image_tokens + text,
            "model": name,
            "by": who,
            "load": load,
            "ms": 1e3 * taken.median,
            "low": 1e3 * taken.low,
            "high": 1e3 * taken.high,
            "of dense": taken.median / reference.median,
            "FLOPs": flops / work(dense).total.flops,
            "TFLOP": flops / 1e12,
            "of peak": flops / taken.median / peak,
            "of torch": taken.median / reference.median * dense_of_torch,
            "cores, ms": 1e3 * taken.cores,
            "c. of dense": taken.cores / reference.cores,
        }

    for who, name in calls:
        yield row(who, name, "", times[who, name], times["ours", DENSE])
    calls.clear()
    rivals.clear()  # their weights make room for ours
    for name in NAMES[1:]:
        for load in LOADS if name == "flux_moe_l" else ("random",):
            with routing(load, image_tokens + text):
                sparse = ours(config_of(name, options.dim, options.divide), dtype, arguments)
            times = measure(base | {("ours", name): sparse}, options.rounds)
            yield row("ours", name, load, times["ours", name], times["ours", DENSE])
            del sparse, times  # before the next one's weights come


def main() -> None:
    options = parser(__doc__, rounds=7 if on_cpu() else 20)
    options.add_argument("--dim", type=int, default=512 if on_cpu() else 3072)
    options.add_argument("--divide", type=int, default=4 if on_cpu() else 1, help="the depth")
    sizes = [512] if on_cpu() else [1024, 512]
    options.add_argument("--pixels", type=int, nargs="+", default=sizes, help="of a side")
    options.add_argument("--text_tokens", type=int, default=256 if on_cpu() else 512)
    options.add_argument("--no-torch", dest="torch", action="store_false")
    options = options.parse_args()
    peak = limits()
    print(f"{peak['matmul, FLOP/s'] / 1e9:.0f} GFLOP/s, {peak['copy, bytes/s'] / 1e9:.1f} GB/s")

    def rows():
        for pixels in options.pixels:
            yield from compare(options, (pixels // 16) ** 2, peak["matmul, FLOP/s"])

    columns = {"tokens": "6d", "model": "<11", "by": "<14", "load": "<8", "ms": "9.1f"}
    columns |= {"low": "9.1f", "high": "9.1f", "of dense": "8.2f", "FLOPs": "6.2f"}
    columns |= {"TFLOP": "7.3f", "of peak": "7.2f", "of torch": "8.2f"}
    columns |= {"cores, ms": "9.1f", "c. of dense": "11.2f"} if on_cpu() else {}
    finish(options, table(columns, rows()), limits=peak)


if __name__ == "__main__":
    main()
