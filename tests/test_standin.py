"""The stand-in accelerator does what tests rely on: CPU's bytes, a device apart, refusals as CUDA's."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from .standin import run_on_standin

if find_spec("llmcompressor") is None:
    pytest.skip("llm-compressor is not here", allow_module_level=True)

IMPORTS = """
import copy, torch
import torch.nn.functional as F
from tests.standin import install
device = install()
torch.manual_seed(0)
"""


def refused(call: str, message: str = "same device") -> str:
    return f"""
try:
    {call}
except RuntimeError as error:
    assert {message!r} in str(error), error
else:
    raise AssertionError("not refused")
"""


def test_it_is_the_accelerator_that_code_asks_torch_for():
    run_on_standin(f"""{IMPORTS}
assert install() == device == torch.device("standin:0") == torch.device("standin", 0) != torch.device("standin")
assert torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == "standin"
assert torch.accelerator.device_count() == 1 and torch.accelerator.current_device_index() == 0
assert torch.accelerator.get_memory_info(0)[1] > 0 and torch.accelerator.max_memory_allocated() == 0
torch.accelerator.synchronize(), torch.accelerator.empty_cache(), torch.accelerator.reset_peak_memory_stats()
stream, event = torch.Stream(), torch.Event()
with stream:
    event.record(stream)
torch.accelerator.current_stream().wait_event(event)
for made in (torch.zeros(3, device="standin"), torch.arange(3, device=device), torch.tensor([1, 2.5], device=device),
             torch.full((2,), 7.0, device=device), torch.ones(2).to("standin", non_blocking=True),
             torch.ones(2).pin_memory().to(device), torch.zeros(0, 4, device=device)):
    assert made.device == device and made.cpu().device.type == "cpu"
assert torch.arange(3, device=device).tolist() == [0, 1, 2] and torch.tensor(4.5, device=device).item() == 4.5
with torch.autocast("standin", enabled=False):
    pass
layer = torch.nn.Linear(2, 2)
layer.alias, before = layer.weight, layer.weight
assert layer.to(device).weight is before is layer.alias and before.device == device
assert copy.deepcopy(layer).weight.equal(layer.weight) and copy.deepcopy(layer).weight.device == device
""")


def test_operands_of_two_devices_are_refused_as_on_cuda():
    cases = [
        *("x @ y", "x + y", "y + x.sum()", "x.add_(y)", "y.add_(x)", "z.add_(x.sum())", "torch.where(x > 0, x, y)"),
        *("torch.cat([x, y])", "torch.stack([x, y])", "F.linear(x, y)", "F.embedding(i, x)", "x.index_select(0, i)"),
        *("x.gather(0, i[:, None])", "x.masked_fill(y > 0, 0.0)", "y[i.to(device)]", "x.index_add_(0, i, x)"),
        *("x.index_put_((i,), y)", "torch.linalg.solve(x, y)", "F.layer_norm(x, (4,), y[0])"),
    ]
    script = f"{IMPORTS}\ny, i, z = torch.ones(4, 4), torch.arange(4), torch.tensor(2.0)\nx = y.to(device)\n"
    script += "".join(refused(case, "device") for case in cases)
    script += refused("torch.rand(2, device=device, generator=torch.Generator())", "generator")
    script += refused("torch.multinomial(x, 1, generator=torch.Generator())", "generator")
    script += (
        "x + z, x * 2, x[i], x[y > 0], x.fill_(z), x.masked_fill(x > 0, z), torch.where(x > 0, x, z), x.copy_(y)\n"
    )
    script += "x.index_put_((i,), z), z.copy_(x.sum()), torch.maximum(x, z), x[0].item() if False else None\n"
    script += """
@torch.library.custom_op("standin_test::host", mutates_args=(), device_types="cpu")
def host(x: torch.Tensor) -> torch.Tensor:
    return x.clone()
""" + refused("host(x)", "only the CPU has it")
    run_on_standin(script)


OPERATIONS = """
def step(x, w, i, dev):
    a = F.linear(x, w).softmax(-1) @ w
    b = F.rms_norm(F.layer_norm(a, (8,)), (8,)) + F.silu(x)
    c = b.index_select(0, i[:4]).index_add(0, i[:2], x[:2]) + torch.zeros(4, 8, device=dev).index_add_(0, i[:4], x[:4])
    d = torch.where(c > 0, c, -2 * c).scatter_add(1, i[None, :4] % 4, x[:1, :4]).gather(1, i[None, :4].expand(4, 4))
    e, chosen = torch.topk(b, 3)
    f = torch.stack([torch.cat([d, d]).sum(-1), e.sum(-1)])
    s = x.T @ x + 8 * torch.eye(8, device=dev)
    l = torch.linalg.cholesky(s)
    g = torch.cholesky_inverse(l) + torch.linalg.solve(s, w)
    h = x * 1
    h[1:, 2:].mul_(3)[0] = 5
    h.view(-1)[::3] += 1
    h.t().add_(h[3, 3].clone()).clamp_(max=4)
    k = torch.polar(x.abs(), x).conj() * torch.view_as_complex(torch.stack([x, x], -1))
    p = (x.abs() % 0.3 + x.double().pow(2).float()).to(torch.bfloat16) * 1.7
    q = F.conv1d(x[None], w[:, :, None], padding=1) + F.cross_entropy(a, i) + F.silu(F.dropout(x, 0.5)).sum()
    m = torch.multinomial(a.detach().abs() + 1, 4)
    order = torch.argsort(a.detach(), dim=-1, stable=True)
    loss = f.sum() + g.sum() + h.pow(2).sum() + k.real.sum() + p.float().sum() + q.sum() + torch.view_as_real(k).sum()
    n = torch.histc(i.float(), 8), torch.cumsum(x, 0), torch.unique(i % 3), torch.nonzero(x > 0), torch.bincount(i)
    r = torch.rand(4, device=dev), torch.randperm(9, device=dev), x.new_empty(3).normal_(), torch.randn(3, device=dev)
    y = x.detach()
    t = torch.tensor(7, device=dev) % 4, torch.add(y, 1, out=torch.empty(0, device=dev)), y.to(torch.float8_e4m3fn)
    u = torch.zeros(2, device=dev).resize_(0).resize_(3).zero_(), y.view(torch.int32), y.std(), *torch.aminmax(y)
    return loss, [a, b, c, d, e, chosen, f, l, g, h, p, q, m, order, loss, *n, *r, *t, *u]


def run(dev):
    torch.manual_seed(1)
    x, w = (t.to(dev).requires_grad_() for t in start)
    loss, values = step(x, w, torch.arange(8, device=dev), dev)
    loss.backward()
    values += [x.grad, w.grad]
    assert all(v.device == torch.device(dev) for v in values)
    return values


start = torch.randn(8, 8), torch.randn(8, 8)
for n, (ours, cpus) in enumerate(zip(run(device), run("cpu"), strict=True)):
    assert ours.dtype == cpus.dtype and ours.shape == cpus.shape and ours.stride() == cpus.stride(), n
    ours, cpus = (v.float() if v.itemsize == 1 else v for v in (ours.cpu(), cpus))
    assert ours.equal(cpus), (n, ours, cpus)
"""


def test_operations_and_their_gradients_give_the_cpus_bytes():
    run_on_standin(IMPORTS + OPERATIONS)


def test_views_share_memory_and_storage():
    run_on_standin(f"""{IMPORTS}
base = torch.zeros(4, 6, device=device)
view = base[1:, 2:].t()
view[0].fill_(3)
base.view(torch.int32)[0, 0] = 1
assert base.cpu().eq(3).sum() == 3 and base[0, 0] > 0
assert view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr() and view.storage_offset() == 8
assert view._base is base and base._version == view._version
other = base.cpu()
base.zero_()
assert other.ne(0).any() and not base.ne(0).any()
host = torch.ones(3)
there = host.to(device)
host.zero_()
assert there.sum() == 3
""")


MODELS = """
from integration.tiny_models import model_class, tiny_config

ids = torch.randint(0, 256, (2, 24))
for family in ("qwen3_moe", "deepseek_v3"):
    for dtype in (torch.float32, torch.bfloat16):
        model = model_class(family).from_config(tiny_config(family), attn_implementation="eager").to(dtype)
        results = []
        for dev, run in (("cpu", copy.deepcopy(model)), (device, model.to(device))):
            out = run(input_ids=ids.to(dev), labels=ids.to(dev))
            out.loss.backward()
            results.append([out.logits] + [p.grad for p in run.parameters() if p.grad is not None])
        assert all(theirs.equal(ours.cpu()) for theirs, ours in zip(*results, strict=True)), (family, dtype)
"""

ONESHOT = """
import pathlib, tempfile
from datasets import Dataset
from integration.tiny_models import build_tiny
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.utils.dev import get_main_device, load_context
from transformers import AutoModelForCausalLM
from tests.standin import absent

def compress(folder, out, expected):
    assert str(get_main_device()) == expected
    with load_context():
        model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager", device_map="cpu")
    torch.manual_seed(0)
    data = [{"input_ids": torch.randint(0, 255, (64,)).tolist(), "attention_mask": [1] * 64} for _ in range(2)]
    used = set()
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, out: used.add(str(out.device)))
    oneshot(model=model, dataset=Dataset.from_list(data), output_dir=folder / out, num_calibration_samples=2,
            recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]), max_seq_length=64)
    assert used == {expected}
    return (folder / out / "model.safetensors").read_bytes()

with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    build_tiny("qwen3_moe", folder / "model", num_experts=2, num_hidden_layers=1)
    with absent():
        theirs = compress(folder, "theirs", "cpu")
    assert compress(folder, "ours", "standin:0") == theirs
"""

ONLOADS = """
from compressed_tensors.offload import dispatch_model, get_execution_device, update_offload_parameter
from compressed_tensors.utils import is_accelerator_type
from tests.standin import copying_onloads

assert is_accelerator_type("standin")
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
x = torch.randn(2, 4)
expected = model(x)
with copying_onloads(model):
    assert get_execution_device(model) == device and model[0].weight.device == device
    assert model[0].weight is not model[0].weight
    model[0].weight.data.zero_()  # lost, as on a GPU
    assert model(x.to(device)).cpu().equal(expected)
    update_offload_parameter(model[1], "bias", torch.zeros(4))
assert model[0].weight.device.type == "cpu" and model[0].weight.any() and not model[1].bias.any()
dispatch_model(model)
assert model[0].weight.device == device
"""


def test_models_and_stock_llm_compressor_give_the_cpus_bytes_on_it():
    run_on_standin(IMPORTS + MODELS + ONLOADS + ONESHOT)


def test_a_failure_there_is_a_failure_here(tmp_path):
    with pytest.raises(AssertionError, match="ValueError: from there"):
        run_on_standin("raise ValueError('from there')")
    script = tmp_path / "script.py"
    script.write_text("import sys, torch\nprint(torch.ones(1, device='standin').item(), sys.argv[1:])")
    # What is imported before the script may say something first.
    assert run_on_standin(script, 3).splitlines()[-1] == "1.0 ['3']"
