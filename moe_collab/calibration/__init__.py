"""What calibration tokens tell of a model's matrices: which they reach, what errors there cost, how to round them."""

from .experts import ExpertWeights
from .live import float32_weights, held_out, inputs_of, log_probabilities, masked_routers, mean_kl, replaced_weights
from .rounded_model import Trial, kept_masks, round_model
from .samples import LayerSamples, capture, capture_layers

__all__ = [
    "ExpertWeights",
    "LayerSamples",
    "Trial",
    "capture",
    "capture_layers",
    "float32_weights",
    "held_out",
    "inputs_of",
    "kept_masks",
    "log_probabilities",
    "masked_routers",
    "mean_kl",
    "replaced_weights",
    "round_model",
]
