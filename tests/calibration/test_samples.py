"""The captured Fisher information predicts what small errors really do."""

import re

import pytest
import torch

pytest.importorskip("llmcompressor")

from moe_collab.calibration import capture, float32_weights, log_probabilities, masked_routers, mean_kl
from moe_collab.calibration.study import LayerStudy
from moe_collab.errors import MoeCollabError
from moe_collab.moe_model import describe


def test_predicts_the_kl_of_noise_at_the_last_layer(model, batches):
    # Noise further down also makes later routers choose otherwise, which no second-order term sees.
    layer = describe(model).layers[-1]
    with float32_weights(model), torch.no_grad():
        base = [log_probabilities(model, batch) for batch in batches]
        gradient = capture(model, [layer], batches)[layer.name].gradient
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randn(batch["input_ids"].numel(), 128, generator=generator) * 0.05 for batch in batches]
        waiting = iter(noise)
        handle = layer.experts.register_forward_hook(lambda _m, _a, out: out + next(waiting).reshape(out.shape))
        measured = mean_kl(model, batches, base)
        handle.remove()
    predicted = float((gradient * torch.cat(noise)).sum(-1).square().mean() / 2)
    assert predicted == pytest.approx(measured, rel=0.25)


def test_weights_are_as_they_were(model, batches):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with float32_weights(model):
        assert next(model.parameters()).dtype == torch.float32
        capture(model, describe(model).layers, batches[:1])
    after = model.state_dict()
    assert all(
        torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items()
    )


def test_masked_routers_never_choose_the_dropped(model, batches):
    moe = describe(model)
    kept = {layer.name: torch.arange(16) % 3 != 0 for layer in moe.layers}
    chosen, before = [], [vars(layer.router).get("forward") for layer in moe.layers]
    handles = [
        layer.router.register_forward_hook(lambda _m, _a, out: chosen.append(out[2].unique())) for layer in moe.layers
    ]
    with masked_routers(moe, kept), torch.no_grad():
        model(input_ids=batches[0]["input_ids"])
    for handle in handles:
        handle.remove()
    assert all((ids % 3 != 0).all() for ids in chosen) and len(chosen) == len(moe.layers)
    assert [vars(layer.router).get("forward") for layer in moe.layers] == before


def test_losing_an_expert_costs_more_the_more_of_them_are_gone(model, batches):
    layer = describe(model).layers[0]
    with float32_weights(model):
        study = LayerStudy(layer, capture(model, [layer], batches)[layer.name])
        alone, besides = study.drop_costs(), study.drop_costs(dropped=[0, 1, 2, 3])
    assert (alone >= 0).all() and alone.max() > 0
    assert besides[4:].sum() > alone[4:].sum()


def test_padding_is_left_out(model, batches):
    layer = describe(model).layers[0]
    padded = {k: v.clone() for k, v in batches[0].items()}
    padded["attention_mask"][:, 100:] = 0
    assert capture(model, [layer], [padded])[layer.name].num_tokens == 8 * 100


@pytest.mark.parametrize("what", ["inputs", "outputs"])
def test_nan_is_named_by_the_layer_where_it_begins(what, model, batches):
    layers = describe(model).layers
    if what == "inputs":
        spoil = layers[1].experts.register_forward_pre_hook(lambda _m, args: (args[0] * float("nan"), *args[1:]))
    else:
        spoil = layers[1].experts.register_forward_hook(lambda _m, _args, out: out * float("nan"))
    message = f"^{re.escape(layers[1].name)}: the experts' {what} on the calibration data are NaN"
    try:
        with pytest.raises(MoeCollabError, match=message):
            capture(model, layers, batches[:1])
        with pytest.raises(MoeCollabError, match=r"^the model's predictions on the calibration data are NaN"):
            capture(model, layers[:1], batches[:1])
    finally:
        spoil.remove()
