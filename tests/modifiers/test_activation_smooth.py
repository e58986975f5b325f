"""ActivationSmoothModifier's smoothing changes no prediction and lowers the error of rounding."""

import pytest
import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from integration.compress import calibration
from moe_collab.modifiers.glue.channel_scales import multiplies_by_weight
from moe_collab.moe_model import describe

from .conftest import load, samples
from .smoothing_models import EVERYTHING, Trained, equal, logits, smooth, state


def uneven(family, dtype):
    """A model some of whose channels stand out, before the MoE blocks and inside experts."""
    model = load(family) if not isinstance(family, torch.nn.Module) else family
    model = model.to(dtype)
    for layer in describe(model).layers:
        model.get_submodule(layer.name.rpartition(".")[0]).post_attention_layernorm.weight.data[::16] *= 32
        for index in layer.live_experts:
            layer.expert(index).up_proj.weight.data[::16] *= 32
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_smoothing_changes_no_prediction(family, dtype, tiny):
    model = uneven(tiny(family), dtype)
    before, weights = logits(model), state(model)[0]
    smooth(model, strength=0.5, norm_strength=0.5, data=samples(4))
    assert torch.equal(before, logits(model))
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])]
    for part in ("post_attention_layernorm", "mlp.gate.", "0.gate_proj", "0.up_proj", "0.down_proj"):
        assert any(part in name for name in changed), part
    if family == "deepseek_v3":
        shared = [name for name in changed if "shared_experts" in name]
        assert len(shared) == 2 and not any("down_proj" in name for name in shared)


def test_the_gate_of_a_shared_expert_is_smoothed_too(tiny):
    like = load(tiny("qwen3_moe")).config.to_dict()
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "moe_intermediate_size")
    config = CONFIG_MAPPING["qwen2_moe"](
        **{key: like[key] for key in same},
        num_key_value_heads=2,
        shared_expert_intermediate_size=128,
        num_experts=8,
        initializer_range=0.15,
    )
    model = uneven(linearize_moe(AutoModelForCausalLM.from_config(config).eval()), torch.bfloat16)
    model.config._name_or_path = str(tiny("qwen3_moe"))  # of the tokenizer
    before, gate = logits(model), model.model.layers[0].mlp.shared_expert_gate.weight.clone()
    smooth(model, norm_strength=0.5, data=samples(4))
    assert torch.equal(before, logits(model))
    assert not torch.equal(gate, model.model.layers[0].mlp.shared_expert_gate.weight)


@pytest.mark.parametrize("field", ["strength", "norm_strength"])
def test_where_channels_stand_out_smoothing_lowers_the_error_of_rounding(field):
    def trained():
        """Channels made to stand out, the weights after them as much smaller: the model is the same."""
        found = Trained("qwen3_moe").remember()
        for layer in found.moe.layers:
            norm = found.model.get_submodule(layer.name.rpartition(".")[0]).post_attention_layernorm
            experts = [layer.expert(index) for index in layer.live_experts]
            if field == "norm_strength":
                norm.weight.data[::8] *= 64
                layer.router.weight.data[:, ::8] /= 64
            for expert in experts:
                if field == "norm_strength":
                    expert.gate_proj.weight.data[:, ::8] /= 64
                    expert.up_proj.weight.data[:, ::8] /= 64
                else:
                    expert.up_proj.weight.data[::8] *= 64
                    expert.down_proj.weight.data[:, ::8] /= 64
        assert found.kl() == 0
        return found

    plain, smoothed = trained(), trained()
    smooth(smoothed.model, data=calibration(8), **{field: 0.5})
    assert smoothed.kl() == 0
    assert smoothed.kl_in_integers(3) < 0.5 * plain.kl_in_integers(3)


def test_norms_that_do_not_multiply_by_their_weight_are_recognised():
    assert not multiplies_by_weight(Qwen3NextRMSNorm(16)) and not multiplies_by_weight(GemmaRMSNorm(16))
    norm = torch.nn.LayerNorm(16)
    assert multiplies_by_weight(norm)
    norm.bias.data += 1
    assert not multiplies_by_weight(norm)


def test_everything_at_once_is_what_each_does_alone(tiny):
    together, apart = (uneven(load(tiny("qwen3_moe")), torch.float32) for _ in range(2))
    smooth(together, **EVERYTHING)
    smooth(apart, num_experts_per_tok=1)
    assert torch.equal(logits(together), logits(apart))
    assert not equal(state(together), state(apart))
