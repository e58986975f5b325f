"""The samples' Fisher information is autograd's, predicts what small errors really do, and is bounded."""

import re
from functools import partial

import pytest
import torch

pytest.importorskip("llmcompressor")

from moe_collab.calibration import Calibration, Scratch, fisher, log_probabilities, mean_kl
from moe_collab.calibration.at_hand import at_hand, shadowed
from moe_collab.calibration.dropping import DropStudy
from moe_collab.calibration.fisher import FisherPass
from moe_collab.calibration.head import HeadGradients
from moe_collab.calibration.micro_batches import MicroBatches
from moe_collab.calibration.results import Results
from moe_collab.calibration.routing import choosing_among
from moe_collab.calibration.samples import Sampler
from moe_collab.calibration.stream import Stream
from moe_collab.calibration.workspace import Workspace
from moe_collab.errors import MoeCollabError
from moe_collab.moe_model import describe

CPU = torch.device("cpu")


def capture(model, batches, layers=None, linears=None, kept=None):
    stream = Stream(model, describe(model), MicroBatches(batches), Scratch())
    return FisherPass(stream, [layer.name for layer in layers or stream.moe.layers], linears or {}, kept)


def gradients(model, batches, draw):
    """Layer name -> d loss / d (output of its experts), by autograd through the whole model in float32."""
    seen = {layer.name: [] for layer in describe(model).layers}

    def see(name, output):
        seen[name].append(output.clone())
        seen[name][-1].retain_grad()
        return seen[name][-1]

    layers = describe(model).layers
    hooks = [layer.experts.register_forward_hook(lambda *a, n=layer.name: see(n, a[-1])) for layer in layers]
    hooks.append(model.get_input_embeddings().register_forward_hook(lambda *a: a[-1].detach().requires_grad_()))
    with at_hand([m for m in model.modules() if m is not model.get_input_embeddings()], CPU):
        for index, batch in enumerate(batches):
            hidden = model.get_decoder()(**batch, use_cache=False).last_hidden_state[:, :-1]
            logp = (hidden @ model.get_output_embeddings().weight.T).log_softmax(-1).flatten(0, 1)
            draws = torch.rand(2, len(logp), generator=torch.Generator().manual_seed(index))[draw].double()
            sums = logp.detach().softmax(-1).double().cumsum(-1)
            drawn = torch.searchsorted(sums, (draws * sums[:, -1])[:, None]).clamp_max(logp.shape[1] - 1)
            (-logp.gather(1, drawn)).sum().backward()
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([t.grad.reshape(-1, t.shape[-1]) for t in parts]) for name, parts in seen.items()}


def test_block_by_block_gives_the_gradients_of_autograd(float32_model, batches):
    found = capture(float32_model, batches[:2])
    for draw in (0, 1):
        for name, expected in gradients(float32_model, batches[:2], draw).items():
            error = found.layers[name].gradient[draw] - expected
            assert float(error.norm() / expected.norm()) < 1e-5, name


def test_predicts_the_kl_of_noise_at_the_last_layer(model, batches):
    # Noise further down also makes later routers choose otherwise, which no second-order term sees.
    layer = describe(model).layers[-1]
    gradient = capture(model, batches, [layer]).layers[layer.name].gradient.float()
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(batch["input_ids"].numel(), 128, generator=generator) * 0.05 for batch in batches]
    waiting = iter(noise)
    with at_hand(model.modules(), CPU), torch.no_grad():
        base = [log_probabilities(model, batch) for batch in batches]
        handle = layer.experts.register_forward_hook(lambda _m, _a, out: out + next(waiting).reshape(out.shape))
        measured = mean_kl(model, batches, base)
        handle.remove()
    predicted = float((gradient * torch.cat(noise)).sum(-1).square().mean() / 2)
    assert predicted == pytest.approx(measured, rel=0.25)


def test_weights_are_as_they_were(model, batches):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    capture(model, batches[:1])
    after = model.state_dict()
    assert all(
        torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items()
    )
    assert not any("weight" in vars(module) for module in model.modules())


def test_routers_never_choose_the_dropped(model, batches):
    kept = {layer.name: torch.arange(16) % 3 != 0 for layer in describe(model).layers}
    before = [vars(layer.router).get("forward") for layer in describe(model).layers]
    found = capture(model, batches[:1], kept=kept)
    assert all((seen.indices % 3 != 0).all() for seen in found.layers.values()) and len(found.layers) == len(kept)
    assert [vars(layer.router).get("forward") for layer in describe(model).layers] == before


def test_samples_are_bounded_and_even(model, batches, monkeypatch):
    whole = capture(model, batches)
    monkeypatch.setattr(fisher, "Sampler", partial(Sampler, expert_tokens=100, layer_tokens=50))
    few = capture(model, batches)
    for name, seen in few.layers.items():
        assert len(seen.hidden) <= 16 * 100 + 50 and len(seen.layer_tokens) == 50
        assert torch.equal(seen.counts, whole.layers[name].counts) and seen.num_tokens == 4096
        for expert in range(16):
            rows, _ = seen.routed(expert)
            assert len(rows) == min(100, int(seen.counts[expert]))
            assert (seen.indices[rows] == expert).any(1).all()
            everything = whole.layers[name].hidden[whole.layers[name].routed(expert)[0]]
            evenly = torch.arange(len(rows)) * len(everything) // max(len(rows), 1)
            assert torch.equal(seen.hidden[rows], everything[evenly])


def test_losing_an_expert_costs_more_the_more_of_them_are_gone(model, batches):
    layer = describe(model).layers[0]
    study = DropStudy(layer, capture(model, batches, [layer]).layers[layer.name], Results())
    alone, besides = study.costs(), study.costs(dropped=[0, 1, 2, 3])
    assert (alone >= 0).all() and alone.max() > 0
    assert besides[4:].sum() > alone[4:].sum()


def test_costs_of_losing_an_expert_are_those_of_computing_the_layer_without_it(model, batches):
    layer = describe(model).layers[1]
    seen = capture(model, batches[:1], [layer]).layers[layer.name]
    costs, gone = DropStudy(layer, seen, Results()).costs(), 5
    with at_hand(layer.block.modules(), CPU), torch.no_grad():
        hidden = seen.hidden.float()
        outputs = []
        for kept in (None, torch.arange(16) != gone):
            with choosing_among(layer, kept):
                outputs.append(layer.block(hidden[None])[0])
    expected = ((outputs[1] - outputs[0]) * seen.gradient.float()).sum(-1).double().square().mean() / 2
    assert float(costs[gone]) == pytest.approx(float(expected), rel=1e-3)


def test_padding_is_left_out(model, batches):
    layer = describe(model).layers[0]
    padded = {k: v.clone() for k, v in batches[0].items()}
    padded["attention_mask"][:, 100:] = 0
    assert capture(model, [padded], [layer]).layers[layer.name].num_tokens == 8 * 100


def test_files_give_what_memory_gives(model, batches, tmp_path):
    linears = {name: model.get_submodule(name) for name in ("lm_head", "model.layers.1.self_attn.o_proj")}
    found = []
    for folder in (None, tmp_path / "scratch"):
        calibration = Calibration(model, describe(model), batches, Workspace(folder))
        layers, of_linears = calibration.samples(linears)
        found.append([t.clone() for s in layers.values() for t in (s.hidden, s.gradient, s.weights)])
        found[-1] += [t.clone() for name in linears for t in (of_linears[name].inputs, of_linears[name].gradient)]
        assert folder is None or any(folder.iterdir())
        calibration.close()
    assert all(map(torch.equal, *found)) and not any((tmp_path / "scratch").iterdir())


def test_padding_on_the_left_predicts_nothing():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    data = MicroBatches([{"input_ids": torch.zeros(2, 4, dtype=torch.long), "attention_mask": mask}])
    assert data.predicted.view(2, 4).tolist() == [[False, False, True, False], [True, True, False, False]]


def test_a_batch_that_predicts_nothing_is_harmless(model, batches):
    alone = {"input_ids": batches[0]["input_ids"][:, :1], "attention_mask": torch.ones(8, 1, dtype=torch.long)}
    found = capture(model, [alone, batches[0]], linears={"lm_head": model.lm_head})
    assert torch.isfinite(found.linears["lm_head"].gradient).all() and found.linears["lm_head"].gradient.any()


@pytest.mark.parametrize("use", [Calibration.samples, lambda calibration: calibration.everything])
def test_no_data_is_one_error_where_some_is_needed(use, model):
    calibration = Calibration(model, describe(model), [])
    with pytest.raises(MoeCollabError, match="reached no token"):
        use(calibration)


def test_a_disk_that_is_too_small_is_refused_before_the_first_pass(model, batches, tmp_path, monkeypatch):
    calibration = Calibration(model, describe(model), batches, Workspace(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(FisherPass, "_room_needed", lambda self: 10**18)
        with pytest.raises(MoeCollabError, match=r"3072 tokens needs up to .*1,?000.* of files, but only"):
            calibration.samples()
    needed, most, stock = [], [0], (FisherPass._room_needed, Scratch.zeros)

    def zeros(self, *args):
        made = stock[1](self, *args)
        most[0] = max(most[0], sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))
        return made

    monkeypatch.setattr(FisherPass, "_room_needed", lambda self: needed.append(stock[0](self)) or needed[0])
    monkeypatch.setattr(Scratch, "zeros", zeros)
    calibration.samples()
    assert 0.4 * needed[0] < most[0] <= needed[0]
    calibration.close()


def test_inputs_that_are_nan_are_named_by_the_layer_and_the_sequence(model, batches):
    layer = describe(model).layers[1]

    def spoil(_module, args):
        args[0][5] = float("nan")  # of the sixth sequence

    hook = layer.block.register_forward_pre_hook(spoil)
    message = f"^{re.escape(layer.name)}: the experts' inputs on calibration sequence 5 are NaN"
    try:
        with pytest.raises(MoeCollabError, match=message):
            capture(model, batches[:1])
    finally:
        hook.remove()


def test_outputs_that_are_nan_are_named_too(model, batches):
    layer = describe(model).layers[1]
    down = layer.expert(0).down_proj
    weight = torch.full_like(down.weight, float("nan"))
    message = f"^{re.escape(layer.name)}: the experts' outputs on calibration sequence"
    with shadowed({down: {"weight": weight}}), pytest.raises(MoeCollabError, match=message):
        capture(model, batches[:1])


def test_gradients_that_are_nan_are_named_too(model, batches, monkeypatch):
    stock = HeadGradients._errors
    monkeypatch.setattr(HeadGradients, "_errors", lambda self, i, *rest: stock(self, i, *rest) * (float("nan") ** i))
    layer = describe(model).layers[-1]
    message = f"^{re.escape(layer.name)}: the gradients at the experts' outputs on calibration sequence 8 are NaN"
    with pytest.raises(MoeCollabError, match=message):
        capture(model, batches[:2])
