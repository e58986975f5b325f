"""The one exception this package raises for bad input."""

__all__ = ["MoeCollabError"]


class MoeCollabError(ValueError):
    """Bad input: the message says what is wrong, where (recipe key or tensor), why, and what to do."""
