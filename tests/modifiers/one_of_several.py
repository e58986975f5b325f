"""One process of several that share a calibration: `torchrun one_of_several.py MODEL RECIPE OUTPUT [FOLDER]`."""

import sys

import torch
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from torch import distributed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import moe_collab
from tests.modifiers.conftest import samples

if __name__ == "__main__":
    path, recipe, output, *folder = sys.argv[1:]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    if folder:
        model = moe_collab.load_linearized(path, offload_folder=folder[0])
    else:
        with load_quantizable_moe():  # load_context() of several processes insists on an accelerator
            model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    rows = samples().dataset
    share = len(rows) // distributed.get_world_size()
    mine = rows[distributed.get_rank() * share :][:share]
    oneshot(model=model, recipe=recipe, dataset=DataLoader(mine, batch_size=4), output_dir=output)
    distributed.destroy_process_group()
