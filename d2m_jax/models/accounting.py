"""What a model costs: total and activated parameters and FLOPs, counted from its config alone.

Parameters are read off the abstract tree of models.flux.Flux, so they are the model's own.
Activated are those that one token of one sample meets in a forward:

- everything outside the blocks, the basis of low-rank modulation and the block routers in full;
- of a group of m blocks of which κ run, κ/m of all that is in a block, its modulations included;
- of an MoE FFN the gate and the shared expert in full, and k/n of the normal experts.

FLOPs are those of the matrix products of one example's forward, two per multiply and add: every
activated weight times the tokens that pass it (image, text, both, or one for what reads the global
vector), and 4·N²·D per block for attention over N tokens. The paper's table counts only attention
and FFNs of the blocks, which is 24·D²·N + 4·N²·D for a dense one: `Account.paper_flops`.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import jax

from d2m_jax.config import KINDS, FluxConfig, ModelConfig
from d2m_jax.models.flux import abstract
from d2m_jax.models.size import activated_share, amount

# The paper's table by the names of the configs: activated parameters, FLOPs per forward.
PAPER = {
    "flux_dev": (11.90e9, 66.00e12),
    "flux_moe_l": (5.15e9, 43.42e12),
    "flux_moe_m": (4.0e9, None),
    "flux_moe_s": (3.19e9, 26.43e12),
    "flux_moe_xs": (2.64e9, 20.26e12),
}
PARTS = ("attention", "ffn", "modulation", "routers", "outside")


@dataclass(frozen=True)
class Cost:
    """Parameters, those of them that are activated, and FLOPs per example."""

    parameters: int = 0
    activated: int = 0
    flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.parameters + other.parameters,
            self.activated + other.activated,
            self.flops + other.flops,
        )


@dataclass(frozen=True)
class Account:
    """The cost of one model, by part; `outside` is everything that belongs to no block."""

    image_tokens: int
    text_tokens: int
    parts: dict[str, Cost]

    def __str__(self) -> str:
        return table("this model", self)

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.text_tokens

    @property
    def total(self) -> Cost:
        return sum(self.parts.values(), Cost())

    @property
    def paper_flops(self) -> int:
        """FLOPs as the paper counts them: attention and FFNs of the blocks."""
        return self.parts["attention"].flops + self.parts["ffn"].flops


def account(
    config: FluxConfig | ModelConfig,
    image_tokens: int | None = None,
    text_tokens: int | None = None,
) -> Account:
    """Count a model over the tokens of one example.

    Without numbers these are the ModelConfig's own, or for a bare FluxConfig those of the paper's
    table: 4096 for 1024 × 1024 pixels, and 77.
    """
    if isinstance(config, ModelConfig):
        image_tokens = image_tokens or math.prod(config.grid())
        text_tokens = text_tokens or config.text.length
        config = config.transformer
    image_tokens, text_tokens = image_tokens or 4096, text_tokens or 77
    parts: dict[str, Cost] = dict.fromkeys(PARTS, Cost())
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(config)):
        names = [key.key for key in path]
        activated = int(leaf.size * activated_share(config, names))
        tokens = _tokens(names, image_tokens, text_tokens) if "kernel" in names[-1] else 0
        parts[_part(names)] += Cost(leaf.size, activated, 2 * activated * tokens)
    blocks = sum(stack.groups * stack.active for stack in config.stacks)
    attention = 4 * (image_tokens + text_tokens) ** 2 * config.hidden_size
    parts["attention"] += Cost(flops=blocks * attention)
    return Account(image_tokens, text_tokens, parts)


def flops_per_example(config: FluxConfig, image_tokens: int, text_tokens: int) -> int:
    """FLOPs of one example's forward, for model FLOP utilisation.

    A training step costs three times that; what rematerialisation adds is not utilisation.
    """
    return account(config, image_tokens, text_tokens).total.flops


def table(name: str, account: Account) -> str:
    """An account for people; the paper's figures stand beside those of a model it names."""
    n, image, text = account.tokens, account.image_tokens, account.text_tokens
    lines = [
        f"{name}, one forward of N = {n} tokens ({image} image, {text} text)",
        f"{'':12}{'parameters':>12}{'activated':>12}{'FLOPs':>12}",
    ]
    for part, cost in [*account.parts.items(), ("total", account.total)]:
        amounts = amount(cost.parameters), amount(cost.activated), amount(cost.flops, "G")
        lines.append(f"{part:12}" + "".join(f"{amount:>12}" for amount in amounts))
    for row in comparison(name, account):
        ours, paper = amount(row["ours"]), amount(row["paper"])
        lines.append(f"{row['what']}: {ours}, paper {paper} ({100 * row['difference']:+.1f} %)")
    return "\n".join(lines)


def to_json(name: str, account: Account) -> dict[str, Any]:
    """An account for programs, with everything that `table` prints."""
    return {
        "name": name,
        "image_tokens": account.image_tokens,
        "text_tokens": account.text_tokens,
        **asdict(account.total),
        "parts": {part: asdict(cost) for part, cost in account.parts.items()},
        "paper": comparison(name, account),
    }


def comparison(name: str, account: Account) -> list[dict[str, Any]]:
    """Ours beside the paper's figures for the model of that name, counted its way; else empty."""
    activated, flops = PAPER.get(name, (None, None))
    rows = [
        ("activated parameters", account.total.activated, activated),
        ("FLOPs of attention and FFNs", account.paper_flops, flops),
    ]
    return [
        {"what": what, "ours": ours, "paper": paper, "difference": ours / paper - 1}
        for what, ours, paper in rows
        if paper is not None
    ]


def _part(names: list) -> str:
    """Which part of PARTS a parameter belongs to."""
    if "modulation_basis" in names or names[3:4] in (["img_mod"], ["txt_mod"], ["modulation"]):
        return "modulation"
    if names[0] not in KINDS:
        return "outside"
    if {"router", "gate", "gate_cond"} & set(names):
        return "routers"
    return "ffn" if names[3] in ("img_mlp", "txt_mlp", "mlp") else "attention"


def _tokens(names: list, image_tokens: int, text_tokens: int) -> int:
    """How many tokens of an example pass a weight; one for what reads the global vector."""
    if names[0] in KINDS:
        if _part(names) == "modulation" or names[2] == "router" or "gate_cond" in names:
            return 1
        if names[0] == "single":
            return image_tokens + text_tokens
        return image_tokens if names[3].startswith("img") else text_tokens
    if names[0] == "img_in" or names[:2] == ["final_layer", "linear"]:
        return image_tokens
    return text_tokens if names[0] == "txt_in" else 1
