"""The trained fixture as llm-compressor loads it, and some of its calibration tokens."""

import pytest
import torch

from integration.compress import FIXTURE, tokens
from moe_collab.checkpoint.load import stock_conversions


def load(dtype):
    from llmcompressor.utils import load_context
    from transformers import AutoModelForCausalLM

    import moe_collab  # noqa: F401

    # load_context() would leave its way of loading experts behind for every later test of this process.
    with stock_conversions(), load_context():
        return AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=dtype).eval()


@pytest.fixture(scope="package")
def model():
    return load("auto")


@pytest.fixture(scope="package")
def float32_model():
    """Its hidden states are kept exactly."""
    return load(torch.float32)


@pytest.fixture(scope="package")
def batches():
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens("calibration")[:32].split(8)]
