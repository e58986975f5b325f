"""Works around defects of the pinned transformers and llm-compressor."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from contextvars import ContextVar
from functools import partial, wraps
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from compressed_tensors.offload.cache import DiskCache
from llmcompressor.core import State
from llmcompressor.datasets import utils
from llmcompressor.entrypoints.oneshot import Oneshot
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential.helpers import Subgraph
from llmcompressor.transformers.data import CustomDataset
from llmcompressor.transformers.data.base import _preserve_tokenizer_state, get_columns
from torch import distributed, fx, nn
from torch.utils.data import Sampler

from ...errors import MoeCollabError

__all__ = [
    "DEQUANTIZED",
    "keep_attention_causal",
    "mend_llm_compressor",
    "output_directory",
    "survive_missing_torchvision",
    "when_run_ends",
]

offload_load = import_module("compressed_tensors.offload.load")

DEQUANTIZED = "_moe_collab_dequantized"
"""Attribute of a model whose weights are unquantized, whatever its checkpoint's are: how these were quantized."""
_MARK = "_moe_collab_in_one_piece"
_MENDED = "_moe_collab_mended"
_NO_LIMIT = 2**31
_OUTPUT: ContextVar[str | None] = ContextVar("output_dir", default=None)
_END: ContextVar[ExitStack | None] = ContextVar("end", default=None)


def survive_missing_torchvision() -> None:
    """Let llm-compressor's `load_context()` work where torchvision is not installed.

    transformers 5.17 keeps aliases of moved modules whose `__dir__` imports the target; patching experts calls
    `dir()` on every loaded module, and the aliases of image processors then ask for torchvision.
    """
    if find_spec("torchvision") is not None:
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and "__dir__" in getattr(module, "__dict__", {}):
            module.__dir__ = list  # type: ignore[method-assign]


def mend_llm_compressor() -> None:
    """Put our functions around some of llm-compressor 0.14; each says what is wrong with the stock one."""
    for owner, name, ours in (
        (utils, "_make_sampler", _sample_own_rows),
        (State, "update", _keep_given_data),
        (IntermediatesCache, "pin_memory", _pin_only_for_an_accelerator),
        (CustomDataset, "rename_columns", _tokenize_messages),
        (Subgraph, "forward", _let_our_errors_through),
        (Oneshot, "__call__", _remember_run),
        (Oneshot, "validate_model", _take_dequantized),
        (offload_load, "from_accelerate", _keep_wide_tensors),
    ):
        stock = getattr(owner, name)
        if not hasattr(stock, _MENDED):
            setattr(owner, name, _around(stock, ours))


def _around(stock: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls `ours` with `stock` in front of its arguments."""

    @wraps(stock)
    def call(*args: Any, **kwargs: Any) -> Any:
        return ours(stock, *args, **kwargs)

    setattr(call, _MENDED, True)
    return call


def output_directory() -> str | None:
    """Where the oneshot() that is running will save; None outside of one, and if it was given no `output_dir`."""
    return _OUTPUT.get()


def when_run_ends(do: Callable[[], object]) -> None:
    """Have `do` called when the oneshot() that is running has saved or failed; outside of one, never."""
    if (end := _END.get()) is not None:
        end.callback(do)


def _remember_run(stock: Callable, oneshot: Oneshot, *args: Any, **kwargs: Any) -> Any:
    """Modifiers are not told where the result will go, so they cannot check it before hours are spent, nor when the run
    is over."""
    with ExitStack() as end:
        end.callback(_OUTPUT.reset, _OUTPUT.set(oneshot.output_dir))
        end.callback(_END.reset, _END.set(end))
        return stock(oneshot, *args, **kwargs)


def _take_dequantized(stock: Callable, oneshot: Oneshot, model: Any) -> None:
    """A model whose checkpoint is quantized is refused, by that checkpoint's config; ours are dequantized by then."""
    if not hasattr(model, DEQUANTIZED):
        stock(oneshot, model)


def _keep_wide_tensors(stock: Callable, model: Any) -> Any:
    """Let a model on disk have in float32 what its class keeps in float32 in memory, such as DeepSeek-V3's selection
    biases; stock offloading reads them as bfloat16, which leaves few different values of them."""
    found = stock(model)
    patterns = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, module in model.named_modules():
        for cache in (module._parameters, module._buffers):
            if isinstance(cache, DiskCache):
                wide = [own for own in cache.offloaded_values if any(part in f"{name}.{own}" for part in patterns)]
                for own in wide:
                    entry = cache.index.pop(cache.offloaded_values[own])
                    offloaded = cache.offloaded_values[own] = cache.offloaded_values[own].float()
                    # Files are called by ids, of which the old tensor's may be another's from now on.
                    file = cache._get_ct_file_path(str(cache.offload_dir), offloaded)
                    os.replace(entry["safetensors_file"], file)
                    cache.index[offloaded] = entry | {"dtype": "float32", "safetensors_file": file}
    return found


def _keep_given_data(stock: Callable, state: State, *args: Any, calib_data: Any = None, **kwargs: Any) -> Any:
    """Let the session have the calibration data that its pipelines read, not a deep copy.

    A copy shuffles on its own, takes memory, and cannot be made of a loader that holds a generator or worker processes.
    """
    if calib_data is not None:
        state.data.calib = calib_data
    return stock(state, *args, **kwargs)


def _sample_own_rows(stock: Callable, args: Any, dataset: Any) -> Any:
    """Of several processes each samples its own share of a dataset; an empty one is an error.

    The stock sampler counts from the beginning of the share, where its loader counts from that of the whole dataset:
    so every process would see the first share.
    """
    if len(dataset) == 0:
        raise MoeCollabError(
            "oneshot(dataset=...): the calibration dataset has no rows, or has none left after preprocessing. With "
            "`concatenate_data` it must hold at least `max_seq_length` tokens."
        )
    sampler = stock(args, dataset)
    if sampler.data_source is dataset:
        return sampler
    num_samples = args.num_calibration_samples or len(dataset)
    start, _ = utils._get_partition_start_end(num_samples, distributed.get_rank(), distributed.get_world_size())
    return _Shifted(sampler, start)


class _Shifted(Sampler[int]):
    """What another sampler draws, with `start` added to each index."""

    def __init__(self, sampler: Any, start: int) -> None:
        self._sampler, self._start = sampler, start

    def __iter__(self) -> Iterator[int]:
        return (self._start + index for index in self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


def _let_our_errors_through(stock: Callable, subgraph: Subgraph, *args: Any, **kwargs: Any) -> Any:
    """An error that one of our hooks raises comes out as it is, not as a RuntimeError behind the traced source code."""
    try:
        return stock(subgraph, *args, **kwargs)
    except RuntimeError as error:
        if isinstance(error.__cause__, MoeCollabError):
            raise error.__cause__ from None
        raise


def _pin_only_for_an_accelerator(stock: Callable, cache: IntermediatesCache, *args: Any, **kwargs: Any) -> None:
    """`AWQModifier` pins memory for copies to an accelerator, which fails on a host that has none."""
    if torch.accelerator.is_available():
        stock(cache, *args, **kwargs)


def _tokenize_messages(stock: Callable, manager: CustomDataset, dataset: Any) -> Any:
    """Tokenize a dataset that has conversations in a column `messages`, and no text or tokens, by the chat template.

    Stock `CustomDataset` knows no such column. It drops every column the tokenizer has no argument for, and the empty
    dataset then fails in a sampler. This is the first of its steps after a user's own `preprocessing_func`, and the
    stock tokenizer, which would put special tokens before those of the template, leaves tokens as they are.
    """
    dataset = stock(manager, dataset)
    columns = get_columns(dataset)
    processor: Any = manager.processor
    known = {*getattr(processor, "model_input_names", ()), *signature(processor.__call__).parameters}
    if known & set(columns):
        return dataset
    if "messages" not in columns:
        raise MoeCollabError(
            f"oneshot(dataset=...): none of the dataset's columns {columns} is input_ids, text or messages. Name "
            "the one that holds the text as `text_column`, or give a `preprocessing_func` that makes a `text`."
        )
    holder = next((it for it in (processor, manager.tokenizer) if getattr(it, "chat_template", None)), None)
    if holder is None:
        raise MoeCollabError(
            f"oneshot(dataset=...): of the dataset's columns {columns} only `messages` can be used, but this model's "
            "processor has no chat template to make text of it. Set `processor.chat_template` and pass the processor "
            "to oneshot(), or give a `preprocessing_func` that makes a `text`."
        )
    with _preserve_tokenizer_state(manager.tokenizer):
        return manager.map(
            dataset,
            partial(_chat_tokens, manager, holder),
            batched=False,
            keep_in_memory=True,
            remove_columns=columns,
            num_proc=manager.dataset_args.preprocessing_num_workers,
            load_from_cache_file=not manager.dataset_args.overwrite_cache,
            desc="Tokenizing messages",
        )


def _chat_tokens(manager: CustomDataset, holder: Any, sample: Any) -> dict[str, Any]:
    """The tokens of one conversation, by the chat template that `holder` has and that writes all special tokens."""
    try:
        text = holder.apply_chat_template(sample["messages"], tokenize=False)
    except Exception as error:  # a template raises whatever its author, Jinja or Python finds fitting
        raise MoeCollabError(
            f"oneshot(dataset=...): the chat template does not take the conversation {str(sample['messages'])[:200]}: "
            f"{error}. Each of its messages needs a `role` and a `content`, in an order the template knows. Leave it "
            "out, or give a `preprocessing_func` that makes a `text`."
        ) from error
    tokenizer: Any = manager.tokenizer
    length = manager.max_seq_length
    if length >= _NO_LIMIT:  # what a tokenizer that knows no maximum says, and cannot truncate to
        return dict(tokenizer(text, add_special_tokens=False))
    limits = {"padding": manager.padding, "max_length": length, "truncation": True}
    return dict(tokenizer(text, add_special_tokens=False, **limits))


def keep_attention_causal(model: nn.Module) -> None:
    """Let llm-compressor's layer-by-layer calibration of `model` see a causal mask.

    It traces with a mask-making function in one piece where the model calls it by its own name. Qwen3-MoE, Mixtral and
    PhiMoE call it by a local one: then it is traced through, the mask is lost, and every token sees those behind it.
    """
    module = sys.modules[type(model).__module__]
    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        function = getattr(module, name, None)
        if function is not None and not hasattr(function, _MARK):
            setattr(module, name, _in_one_piece(function))


def _in_one_piece(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, a single call in whatever graph it is traced into."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        proxies = [value for value in (*args, *kwargs.values()) if isinstance(value, fx.Proxy)]
        if not proxies:
            return function(*args, **kwargs)
        # A graph cannot hold a config as an argument.
        bound = wraps(function)(partial(function, config=kwargs.pop("config")))
        return proxies[0].tracer.create_proxy("call_function", bound, args, kwargs)

    setattr(call, _MARK, True)
    return call
