"""One forward of FLUX.1 [dev] and of the paper's sparse sizes, against diffusers' transformer.

    python benchmarks/transformer.py --output transformer.json

On a GPU: full size, bfloat16, 1024² and 512² pixels, torch eager and compiled, with PyTorch's best
attention. On a CPU: --dim 512, a quarter of the depth, float32, torch eager. Weights are random,
routing is not: MoE-L runs with balanced, random and skewed loads, the others with random ones.

Every model takes turns with our dense one and torch's; medians, and the middle half of the rounds.
`of dense` is time over our dense one's within the same rounds, `FLOPs` the same for work, `of
torch` time over the quicker torch's, `of peak` work per second over that of a large matmul. On a
CPU `cores` is what all cores spent, which other work on the machine hardly moves.
"""

import os
from functools import partial

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
from models import LOADS, NAMES, config_of, inputs, random_params, routing
from timing import finish, limits, measure, on_cpu, parser, table, usual_dtype

from d2m_jax.config import FluxConfig
from d2m_jax.evaluate.accounting import account
from d2m_jax.models.flux import model_of

DENSE = NAMES[0]


@partial(jax.jit, static_argnums=(0, 1))
def forward(config: FluxConfig, dtype, params, arguments):
    return model_of(config, params, dtype)(*arguments)


def ours(config: FluxConfig, dtype, arguments: tuple):
    """A call of our model, compiled while the routing in force holds."""
    params = random_params(config, dtype)
    program = forward.lower(config, dtype, params, arguments).compile()
    return lambda: program(params, arguments)


def theirs(config: FluxConfig, arguments: tuple, compiled: bool):
    """A call of diffusers' FluxTransformer2DModel of the same shape on the same device."""
    import torch
    from diffusers import FluxTransformer2DModel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    cuda = torch.cuda.is_available() and not on_cpu()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = FluxTransformer2DModel(
            in_channels=config.in_channels,
            num_layers=sum(stack.depth for stack in config.double),
            num_single_layers=sum(stack.depth for stack in config.single),
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
    run = torch.compile(model, mode="max-autotune-no-cudagraphs") if compiled else model
    best = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

    def call():
        with torch.no_grad(), sdpa_kernel(best, set_priority=True):
            run(**values, return_dict=False)
        if cuda:
            torch.cuda.synchronize()

    return call


def compare(options, image_tokens: int, peak: float):
    """Rows of one image size."""
    dtype, text = usual_dtype(), options.text_tokens
    dense = config_of(DENSE, options.dim, options.divide)
    arguments = inputs(dense, image_tokens, text, dtype)
    work = partial(account, image_tokens=image_tokens, text_tokens=text)
    rivals = {"torch eager": False, "torch compiled": True} if options.torch else {}
    if on_cpu():
        rivals.pop("torch compiled", None)
    base = {("ours", DENSE): ours(dense, dtype, arguments)}
    for name, compiled in rivals.items():
        base[name, DENSE] = theirs(dense, arguments, compiled)
    runs = [(DENSE, "")] + [
        (name, load)
        for name in NAMES[1:]
        for load in (LOADS if name == "flux_moe_l" else ("random",))
    ]
    for name, load in runs:
        config = config_of(name, options.dim, options.divide)
        calls = dict(base)
        if load:
            with routing(load, max(image_tokens + text, image_tokens)):
                calls["ours", name] = ours(config, dtype, arguments)
        times = measure(calls, options.rounds)
        reference = times["ours", DENSE]
        torch = min((times[rival, DENSE].median for rival in rivals), default=None)
        for who, what in calls if name == DENSE else [("ours", name)]:
            taken, flops = times[who, what], work(config).total.flops
            yield (
                {
                    "tokens": image_tokens + text,
                    "model": what,
                    "by": who,
                    "load": load,
                    "ms": 1e3 * taken.median,
                    "low": 1e3 * taken.low,
                    "high": 1e3 * taken.high,
                    "of dense": taken.median / reference.median,
                    "FLOPs": flops / work(dense).total.flops,
                    "TFLOP": flops / 1e12,
                    "of peak": flops / taken.median / peak,
                }
                | (
                    {"cores, ms": 1e3 * taken.cores, "c. of dense": taken.cores / reference.cores}
                    if on_cpu()
                    else {}
                )
                | ({"of torch": taken.median / torch} if torch else {})
            )
        # What a program captured goes with its call, before the next one's weights come.
        calls.clear()
        jax.clear_caches()


def main() -> None:
    options = parser(__doc__, rounds=7 if on_cpu() else 20)
    options.add_argument("--dim", type=int, default=512 if on_cpu() else 3072)
    options.add_argument("--divide", type=int, default=4 if on_cpu() else 1, help="the depth")
    sizes = [512] if on_cpu() else [1024, 512]
    options.add_argument("--pixels", type=int, nargs="+", default=sizes, help="of a side")
    options.add_argument("--text-tokens", type=int, default=256 if on_cpu() else 512)
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
