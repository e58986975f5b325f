"""What calibration tokens tell about routed experts: whom they reach, and what an error there costs."""

from .experts import ExpertWeights
from .live import float32_weights, inputs_of, log_probabilities, masked_routers, mean_kl, replaced_weights
from .samples import LayerSamples, capture, capture_layers

__all__ = [
    "ExpertWeights",
    "LayerSamples",
    "capture",
    "capture_layers",
    "float32_weights",
    "inputs_of",
    "log_probabilities",
    "masked_routers",
    "mean_kl",
    "replaced_weights",
]
