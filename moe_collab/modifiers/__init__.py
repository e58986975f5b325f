"""The llm-compressor side: importing this package registers our modifiers with its recipes."""

from llmcompressor.modifiers import ModifierFactory

from ..checkpoint import ternary_packed
from .activation_smooth import ActivationSmoothModifier
from .expert_pruning import ExpertPruningModifier
from .fisher_gptq import FisherGPTQModifier
from .glue.compat import mend_llm_compressor, survive_missing_torchvision
from .mixed_bit_alloc import MixedBitAllocModifier
from .router_calibration import RouterCalibrationModifier

__all__ = [
    "ActivationSmoothModifier",
    "ExpertPruningModifier",
    "FisherGPTQModifier",
    "MixedBitAllocModifier",
    "RouterCalibrationModifier",
]

survive_missing_torchvision()
mend_llm_compressor()
ternary_packed.register()
for _modifier in (
    ExpertPruningModifier,
    ActivationSmoothModifier,
    MixedBitAllocModifier,
    FisherGPTQModifier,
    RouterCalibrationModifier,
):
    ModifierFactory.register(_modifier.__name__, _modifier)
