"""Patterns of module names that users write: what they match, and an error where one matches nothing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches

from ..errors import MoeCollabError
from ..outline import Matrix, ModelOutline

__all__ = ["check_ignored", "check_regexes", "is_named", "nothing_matches"]

_REGEX = "re:"


def is_named(entry: str, names: Iterable[str]) -> bool:
    """Whether an entry of an `ignore` list means the Linear called `names`.

    As in llm-compressor: a name, a regex from the name's beginning after `re:`, or the class `Linear`.
    """
    if entry.startswith(_REGEX):
        return any(re.match(entry.removeprefix(_REGEX), name) for name in names)
    return entry == "Linear" or entry in names


def nothing_matches(key: str, pattern: str, names: Collection[str], why: str = "matches no module") -> MoeCollabError:
    """The error for a `pattern` of recipe field `key` that matches none of `names`, with the nearest of them."""
    # Layers and experts are alike: one name for each kind of module is enough to compare with.
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "0", name), name)
    plain = re.sub(r"\d+", "0", re.sub(r"[\\^$]|re:|\.\*", "", pattern)).strip(".")
    tails = {".".join(kind.split(".")[-n:]): kind for kind in kinds for n in range(1, kind.count(".") + 2)}
    close = get_close_matches(plain, list(tails), n=3, cutoff=0.4)
    nearest = list(dict.fromkeys(kinds[tails[tail]] for tail in close)) or list(kinds.values())[:3]
    return MoeCollabError(f"{key}: {pattern!r} {why}. The nearest names: {', '.join(nearest)}.")


def check_ignored(key: str, entries: Iterable[str], outline: ModelOutline) -> None:
    """Raise `MoeCollabError` for an entry of an `ignore` list, `key` in the recipe, that means nothing in the model."""
    for entry in entries:
        known = entry in outline.classes or any(is_named(entry, names) for names in outline.modules.items())
        if not known:
            why = "names no module" + ("" if entry.startswith(_REGEX) else " (regexes begin with re:)")
            raise nothing_matches(key, entry, _names(outline.matrices.values()), why)


def check_regexes(key: str, patterns: Iterable[str], matrices: Collection[Matrix], left: Mapping[str, Matrix]) -> None:
    """Raise `MoeCollabError` for a regex of recipe field `key` that is found in the names of none of `matrices`.

    `left` are the matrices that `ignore` does not name: a regex found only in ignored ones is an error too, because it
    has no effect.
    """
    for pattern in patterns:
        matched = [matrix for matrix in matrices if matrix.found_by(pattern)]
        if not matched:
            raise nothing_matches(key, pattern, _names(matrices), "matches no Linear")
        if not any(matrix.name in left for matrix in matched):
            raise MoeCollabError(
                f"{key}: {pattern!r} matches only what `ignore` leaves alone, such as {matched[0].name}. Take it out "
                "of one of the two."
            )


def _names(matrices: Iterable[Matrix]) -> list[str]:
    return [name for matrix in matrices for name in dict.fromkeys(matrix.names)]
