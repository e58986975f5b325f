"""A decoder taken apart computes what it computes in one piece, for every family."""

from __future__ import annotations

import pytest
import torch

from integration.tiny_models import TINY_FAMILIES, model_class, tiny_config
from moe_collab.decoder import Decoder, decoder_of


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_block_by_block_is_the_whole_model(family: str) -> None:
    """Padding on either side, so that masks matter; hidden states of padding are nobody's concern."""
    torch.manual_seed(0)
    model = model_class(family).from_config(tiny_config(family)).float().eval()
    mask = torch.ones(3, 24, dtype=torch.long)
    mask[1, 17:] = 0
    batch = {"input_ids": torch.randint(0, 256, (3, 24)), "attention_mask": mask}
    decoder = Decoder(model)
    assert len(decoder.blocks) == 2
    with torch.no_grad():
        hidden = decoder.embed(batch)
        for name, block in decoder.blocks.items():
            hidden = decoder.calls(batch, hidden)[name](block, hidden)
        found = decoder.finish(batch, hidden)
        expected = decoder_of(model)(**batch, use_cache=False).last_hidden_state
    assert torch.equal(found[mask.bool()], expected[mask.bool()])
