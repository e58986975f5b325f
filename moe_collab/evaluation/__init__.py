"""How much of a model survived: perplexity, KL divergence to the base model, top-1 agreement."""

from .metrics import Evaluation, evaluate, log_probabilities

__all__ = ["Evaluation", "evaluate", "log_probabilities"]
