"""What calibration tokens tell of a model's matrices: which they reach, what errors there cost, how to round them."""

from .live import float32_weights, inputs_of, log_probabilities, mean_kl
from .micro_batches import MicroBatches, held_out
from .rounded_model import RoundedModel
from .run import Calibration, kept_masks
from .samples import LayerSamples
from .scratch import Scratch
from .stream import Stream
from .trial import Trial
from .workspace import Workspace

__all__ = [
    "Calibration",
    "LayerSamples",
    "MicroBatches",
    "RoundedModel",
    "Scratch",
    "Stream",
    "Trial",
    "Workspace",
    "float32_weights",
    "held_out",
    "inputs_of",
    "kept_masks",
    "log_probabilities",
    "mean_kl",
]
