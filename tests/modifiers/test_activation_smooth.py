"""How many experts are activated, what makes up for those that are not, and smoothing that changes no prediction."""

import json
from contextlib import suppress

import pytest
import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.recipe import Recipe
from llmcompressor.utils import load_context
from loguru import logger
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from integration.compress import FIXTURE, calibration, recipe, tokens
from moe_collab import MoeCollabError
from moe_collab.architectures import describe
from moe_collab.calibration import log_probabilities, mean_kl
from moe_collab.modifiers.activation import bytes_per_token
from moe_collab.modifiers.schemes import rounded, weight_arguments
from moe_collab.modifiers.smoothing import multiplies_by_weight
from moe_collab.modifiers.surgery import set_top_k

from .conftest import load, run, samples

IDS = torch.arange(48)[None] * 5


def smooth(model, *before, data=None, output=None, **fields):
    return run(model, *before, {"ActivationSmoothModifier": fields}, data=data, output=output)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def state(model):
    """(all tensors by name, number of activated experts)."""
    return {name: t.clone() for name, t in model.state_dict().items()}, describe(model).top_k


def equal(one, other):
    # As integers, for NaN is not equal to itself.
    same = (
        torch.equal(a.view(torch.int16), b.view(torch.int16))
        for a, b in zip(one[0].values(), other[0].values(), strict=True)
    )
    return one[0].keys() == other[0].keys() and one[1] == other[1] and all(same)


class Trained:
    """A trained fixture in float32, and KL to what it was on 16 sequences it was not calibrated with."""

    def __init__(self, name):
        self.path = FIXTURE.with_name(name)
        with load_context():
            self.model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        self.moe = describe(self.model.requires_grad_(False))

    def remember(self):
        self.batch = {"input_ids": tokens("selection", self.path)[:16]}
        self.base = log_probabilities(self.model, self.batch)
        return self

    def do_not_renormalise(self):
        """Let weights of the experts chosen be shares of all; outputs stay about as large."""
        for layer in self.moe.layers:
            layer.router.norm_topk_prob = False
            sums = []
            handle = layer.router.register_forward_hook(lambda *seen: sums.append(seen[2][1].sum(-1).mean()))  # noqa: B023
            log_probabilities(self.model, {"input_ids": tokens("calibration", self.path)[:4]})
            handle.remove()
            for index in layer.live_experts:
                layer.expert(index).down_proj.weight.data /= sums[0] / self.moe.routed_scaling_factor
        return self

    def data(self):
        return calibration(24, model=self.path)

    def kl(self):
        return mean_kl(self.model, [self.batch], [self.base])

    def kl_in_integers(self, num_bits):
        """KL once routed experts are rounded to nearest."""
        arguments = weight_arguments(num_bits, 128, symmetric=False)
        for layer in self.moe.layers:
            for *_, module in layer.projections():
                module.weight.data = rounded(module.weight.data, arguments)
        return self.kl()


@pytest.mark.parametrize(
    ("family", "pruning", "wanted", "top_k"),
    [
        ("qwen3_moe", {}, "keep", 4),
        ("qwen3_moe", {}, 3, 3),
        ("qwen3_moe", {}, 0.6, 2),
        ("qwen3_moe", {}, 0.625, 3),
        ("qwen3_moe", {}, 0.01, 1),
        ("qwen3_moe", {"num_experts": 5}, "scale", 3),
        ("deepseek_v3", {"num_experts": 5, "pruning": "masked"}, "scale", 3),
    ],
)
def test_number_of_experts(family, pruning, wanted, top_k, tiny, tmp_path):
    more = {"topk_group": 2} if family == "deepseek_v3" else {}
    before = [{"ExpertPruningModifier": pruning}] if pruning else []
    model = smooth(
        tiny(family, num_experts_per_tok=4, **more),
        *before,
        num_experts_per_tok=wanted,
        output=tmp_path,
        data=samples(4),
    )
    assert describe(model).top_k == top_k
    assert json.loads((tmp_path / "config.json").read_text())["num_experts_per_tok"] == top_k


def test_auto_takes_the_fewest_experts_that_keep_the_limit():
    chosen = {}
    for max_kl in (1e-6, 0.04):
        trained = Trained("qwen3_moe").remember()
        smooth(trained.model, data=trained.data(), num_experts_per_tok="auto", max_kl=max_kl)
        chosen[max_kl] = describe(trained.model).top_k
        assert trained.kl() <= max_kl
    assert chosen == {1e-6: 4, 0.04: 3}
    trained = Trained("qwen3_moe").remember()
    smooth(trained.model, data=trained.data(), num_experts_per_tok=2)
    assert trained.kl() > 0.04


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("renormalised", [True, False])
def test_outputs_are_brought_near_to_what_they_were(family, renormalised):
    def trained():
        model = Trained(family)
        return (model if renormalised else model.do_not_renormalise()).remember()

    matched, plain = trained(), trained()
    smooth(matched.model, data=matched.data(), num_experts_per_tok=2)
    sums = {}
    for layer in plain.moe.layers:
        see = lambda _m, _a, output, name=layer.name: sums.setdefault(name, []).append(output[1].sum(-1).mean())  # noqa: E731
        layer.router.register_forward_hook(see)
    plain.kl()
    set_top_k(plain.moe, 2)
    assert matched.kl() < (0.85 if renormalised else 0.99) * plain.kl()
    # Making up for the sum of the weights instead, as one might where they are not renormalised.
    for layer in plain.moe.layers:
        for index in layer.live_experts:
            layer.expert(index).down_proj.weight.data *= sums[layer.name][0] / sums[layer.name][1]
    assert matched.kl() <= plain.kl()


def test_without_compensation_only_the_number_changes(tiny):
    model = load(tiny("qwen3_moe"))
    before = state(model)
    smooth(model, num_experts_per_tok=1, compensate=False)
    assert equal(state(model), (before[0], 1))


def test_speed_up_is_reported_by_bytes_per_token(tiny):
    model, said = load(tiny("qwen3_moe")), []
    read = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    expert = 3 * 128 * 128 * 2
    moe = describe(model)
    assert bytes_per_token(model, moe, 2) == read - 2 * 6 * expert
    assert bytes_per_token(model, moe, 1) == read - 2 * 7 * expert
    handle = logger.add(said.append, level="INFO")
    with suppress(ValueError):
        smooth(model, num_experts_per_tok=1)
    logger.remove(handle)
    ratio = (read - 12 * expert) / (read - 14 * expert)
    assert any(f"about {ratio:.2f} times as fast (an estimate" in line for line in said)


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


def shift_norm(layer):
    layer.post_attention_layernorm = Qwen3NextRMSNorm(128)


def read_norm(block):
    block.extra = torch.nn.Linear(128, 128)


@pytest.mark.parametrize(
    ("fields", "spoil", "message"),
    [
        ({"norm_strength": 0.5}, shift_norm, "multiply by 1 \\+ weight"),
        (
            {"norm_strength": 0.5},
            lambda layer: read_norm(layer.mlp),
            r"layers\.1\.mlp\.extra is no part of a MoE block",
        ),
    ],
)
def test_what_cannot_be_smoothed_exactly_is_refused(fields, spoil, message, tiny):
    model = load(tiny("qwen3_moe"))
    spoil(model.model.layers[1])
    with pytest.raises(MoeCollabError, match=message):
        smooth(model, data=unreadable(), **fields)
    smooth(model, ignore=[r"layers\.1\."], **fields, data=samples(4))


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gpt_oss", {"strength": 0.5}, "clamp what up_proj puts out"),
        ("qwen3_next", {"norm_strength": 0.5}, "multiply by 1 \\+ weight"),
        ("phimoe", {"num_experts_per_tok": 1}, "always activate 2 experts"),
        ("phimoe", {"num_experts_per_tok": "auto", "max_kl": 1.0}, "always activate 2 experts"),
    ],
)
def test_families_that_forbid_it_are_refused(family, fields, message, tiny):
    with pytest.raises(MoeCollabError, match=message):
        smooth(tiny(family), data=unreadable(), **fields)


def unreadable():
    """Calibration data that must not be read."""

    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            raise AssertionError("the mistake should have been found before calibration")

    return DataLoader(Broken(), batch_size=1)


EVERYTHING = {"num_experts_per_tok": 1, "strength": 0.5, "norm_strength": 0.5}


def test_everything_at_once_is_what_each_does_alone(tiny):
    together, apart = (uneven(load(tiny("qwen3_moe")), torch.float32) for _ in range(2))
    smooth(together, **EVERYTHING)
    smooth(apart, num_experts_per_tok=1)
    assert torch.equal(logits(together), logits(apart))
    assert not equal(state(together), state(apart))


def test_calibration_that_is_not_finite_changes_nothing(tiny):
    model = load(tiny("qwen3_moe"))
    model.model.layers[1].mlp.experts[3].up_proj.weight.data[0] = float("nan")
    before = state(model)
    for fields in ({"strength": 0.5}, EVERYTHING, {"num_experts_per_tok": "auto", "max_kl": 1.0}):
        with pytest.raises(MoeCollabError, match="nothing was changed"):
            smooth(model, data=samples(8), **fields)
        assert equal(state(model), before)


def test_calibration_that_is_interrupted_changes_nothing(tiny):
    model = load(tiny("qwen3_moe"))
    before = state(model)
    rows = list(samples(8).dataset)

    class Interrupted(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            if index == 6:
                raise KeyboardInterrupt
            return rows[index]

    with pytest.raises(KeyboardInterrupt):
        smooth(model, data=DataLoader(Interrupted(), batch_size=1), **EVERYTHING)
    assert equal(state(model), before)


@pytest.mark.parametrize(
    ("family", "pruning", "message"),
    [
        ("qwen3_moe", {}, "can reach only 8 experts, not 9"),
        ("deepseek_v3", {}, "can reach only 4 experts, not 9"),
        ("deepseek_v3", {"num_experts": 4}, "can reach only 2 experts, not 3"),
        ("deepseek_v3", {"num_experts": 4, "pruning": "masked"}, "can reach only 4 experts, not 5"),
    ],
)
def test_more_experts_than_can_be_reached_are_refused_before_calibration(family, pruning, message, tiny):
    before = [{"ExpertPruningModifier": pruning}] if pruning else []
    with pytest.raises(MoeCollabError, match=message):
        smooth(tiny(family), *before, num_experts_per_tok=int(message[-1]), data=unreadable())


def test_a_shared_calibration_pass_is_refused(tiny):
    before = {"ExpertPruningModifier": {"retention": 0.5}}
    with pytest.raises(MoeCollabError, match=r"shares its calibration pass with \['ExpertPruningModifier'\]"):
        run(tiny("qwen3_moe"), before, {"ActivationSmoothModifier": {}}, pipeline="sequential")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 0}, "at least 1"),
        ({"num_experts_per_tok": -2}, "at least 1"),
        ({"num_experts_per_tok": -0.5}, "between 0 and 1"),
        ({"num_experts_per_tok": "half"}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 1.0}, "between 0 and 1"),
        ({"num_experts_per_tok": "auto"}, "need each other"),
        ({"num_experts_per_tok": 1, "max_kl": 0.1}, "need each other"),
        ({"strength": 2}, "less than or equal to 1"),
        ({"norm_strength": -1}, "greater than or equal to 0"),
    ],
)
def test_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        _ = Recipe.create_instance(recipe({"ActivationSmoothModifier": fields})).modifiers
