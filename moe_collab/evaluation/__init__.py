"""How much of a model survived: perplexity, KL divergence to the base model, top-1 agreement."""

from .metrics import Evaluation, evaluate, log_probabilities
from .streaming import compare

__all__ = ["Evaluation", "compare", "evaluate", "log_probabilities"]
