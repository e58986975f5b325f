"""Rows of text to calibrate by, and what a model sees of them."""

import datasets
import pytest
import torch

ROWS = 4096


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Let `datasets` keep what it loads in a folder of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def texts(count=ROWS, length=32):
    letters = torch.randint(97, 123, (count, length), generator=torch.Generator().manual_seed(5))
    return ["".join(map(chr, row)) for row in letters.tolist()]


def watch(model):
    """The rows that the embedding sees from now on, each once."""
    seen = set()
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.update(map(tuple, args[0].tolist())))
    return seen
