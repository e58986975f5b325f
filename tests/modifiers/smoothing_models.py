"""Models to smooth, what they say before and after, and data that must not be read."""

import torch
from llmcompressor.utils import load_context
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from integration.compress import FIXTURE, calibration, tokens
from moe_collab.calibration import log_probabilities, mean_kl
from moe_collab.modifiers.glue.schemes import rounded, weight_arguments
from moe_collab.moe_model import describe

from .conftest import run

IDS = torch.arange(48)[None] * 5
EVERYTHING = {"num_experts_per_tok": 1, "strength": 0.5, "norm_strength": 0.5}


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


def unreadable():
    """Calibration data that must not be read."""

    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            raise AssertionError("the mistake should have been found before calibration")

    return DataLoader(Broken(), batch_size=1)
