"""Adapters that PEFT makes and saves on diffusers' model, merged by PEFT and by us."""

import pytest

from tests.weights import toy

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import numpy as np  # noqa: E402

from d2m_jax.models.flux import abstract  # noqa: E402
from d2m_jax.named_arrays import sizes  # noqa: E402
from d2m_jax.weights.keys import flux_keys, key_table  # noqa: E402
from d2m_jax.weights.lora import lora  # noqa: E402

CONFIG = toy.config(1, 2)
TARGETS = ["attn.to_q", "attn.to_k", "attn.add_v_proj", "ff.net.2", "proj_mlp", "proj_out"]
CONFIGS = {
    "plain": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS),
    "stabilised": lambda: peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=TARGETS
    ),
    "patterns": lambda: peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=TARGETS,
        rank_pattern={"to_k": 2, r"single_transformer_blocks\.1\..*": 4},
        alpha_pattern={"attn.to_q": 7, "q": 11, r"^transformer_blocks\.0\.ff\.net\.2": 9},
    ),
    "stabilised patterns": lambda: peft.LoraConfig(
        r=3, use_rslora=True, target_modules=TARGETS, rank_pattern={"proj_out": 2}
    ),
    "biases": lambda: peft.LoraConfig(r=3, lora_alpha=5, lora_bias=True, target_modules=TARGETS),
    "trained biases": lambda: peft.LoraConfig(
        r=3, lora_alpha=5, bias="lora_only", target_modules=TARGETS
    ),
    "dora": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=TARGETS),
    "whole modules": lambda: peft.LoraConfig(
        r=3, target_modules=TARGETS, modules_to_save=["x_embedder", "norm_out.linear"]
    ),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(
        r=2, alpha=5, target_modules=TARGETS, decompose_both=True, decompose_factor=4
    ),
    "lokr of whole factors": lambda: peft.LoKrConfig(r=64, alpha=5, target_modules=TARGETS),
}


@pytest.mark.filterwarnings("ignore:::peft")  # of keys that hit nothing, and of biases
@pytest.mark.parametrize("name", CONFIGS)
def test_as_peft_merges(tmp_path, name):
    model = toy.diffusers_model(CONFIG)
    before = {n: t.numpy().copy() for n, t in model.state_dict().items()}
    adapted = peft.get_peft_model(model, CONFIGS[name]())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(tmp_path)
    after = {n: t.numpy() for n, t in adapted.merge_and_unload().state_dict().items()}
    changed = [n for n, array in before.items() if not np.array_equal(array, after[n])]
    assert len(changed) >= len(TARGETS) + 2

    def parameters(state):
        table, shapes = flux_keys.keys("diffusers", CONFIG), sizes(abstract(CONFIG))
        return key_table.parameters(table, state, shapes, np.float32)

    params = parameters(before)
    merged = lora.merge(params, params, [lora.read(tmp_path, CONFIG)])
    for ours, expected in parameters(after).items():
        # float32's rounding, of sums of up to 128 products in another order
        np.testing.assert_allclose(
            merged[ours][...], expected[...], rtol=1e-5, atol=1e-5, err_msg=ours
        )
