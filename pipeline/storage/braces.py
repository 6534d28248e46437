"""Shell braces: the names of a pattern, as in bash and webdataset.

Lists `{a,b}`, ranges `{0000..0099}` (zeros kept), `{a..f}`, steps `{0..9..3}`, nested and side by
side. Braces without a list or a range stand for themselves. A backslash is a character of a name,
and so is a dollar sign.
"""

from __future__ import annotations

import re
from itertools import product

from pipeline.errors import UsageError

_MAX_NAMES = 1_000_000  # that one pattern may stand for
_MAX_DEPTH = 50
_RANGE = re.compile(r"([+-]?\d+|[A-Za-z])\.\.([+-]?\d+|[A-Za-z])(?:\.\.([+-]?\d+))?", re.ASCII)


def expand_braces(pattern: str) -> list[str]:
    """Expand a pattern into its names, each once, in bash's order.

    Raises UsageError beyond a million names, and for braces 50 deep.
    """
    return list(dict.fromkeys(_expand(pattern, pattern, 0)))


def _expand(text: str, pattern: str, depth: int) -> list[str]:
    """The names of `text`, a piece of `pattern`; a part before, inside and after each brace."""
    if depth > _MAX_DEPTH:
        raise UsageError(f"{pattern[:200]}: braces more than {_MAX_DEPTH} deep")
    choices: list[list[str]] = []
    while (found := _first_brace(text)) is not None:
        start, end = found
        choices.append([text[:start]])
        choices.append(_choose(text[start + 1 : end], pattern, depth))
        text = text[end + 1 :]
    choices.append([text])
    count = 1
    for choice in choices:
        count *= len(choice)
    _check_count(count, pattern)
    return ["".join(parts) for parts in product(*choices)]


def _check_count(count: int, pattern: str) -> None:
    if count > _MAX_NAMES:
        raise UsageError(f"{pattern[:200]}: stands for {count:,} names; at most {_MAX_NAMES:,}")


def _first_brace(text: str) -> tuple[int, int] | None:
    """Both ends of the first pair of braces with a comma or `..` of its own.

    As for bash, `{}` at the start opens nothing.
    """
    start = text.find("{", 2 * text.startswith("{}"))
    while start >= 0:
        end = _closing(text, start + 1)
        if end is not None:
            return start, end
        start = text.find("{", start + 1)
    return None


def _closing(text: str, start: int) -> int | None:
    """The brace closing the one before `start`: bash passes over those before any comma."""
    level, separated = 0, False
    for index in range(start, len(text)):
        character = text[index]
        if character == "}" and not level:
            if separated:
                return index
        elif character == "{":
            level += 1
        elif character == "}":
            level -= 1
        elif not level and (character == "," or _is_range(text, index)):
            separated = True
    return None


def _is_range(text: str, index: int) -> bool:
    return text.startswith("..", index) and text[index + 2 : index + 3] != "}"


def _choose(inner: str, pattern: str, depth: int) -> list[str]:
    """The content of two braces: a list, else a range, else itself with its braces."""
    if "," in inner:
        found = [name for item in _split(inner) for name in _expand(item, pattern, depth + 1)]
        _check_count(len(found), pattern)
        return found
    match = _RANGE.fullmatch(inner)
    if match is None or match[1].isalpha() != match[2].isalpha():
        return [f"{{{inner}}}"]
    return _count(match[1], match[2], abs(int(match[3] or 1)) or 1, pattern)


def _split(inner: str) -> list[str]:
    """The items of a list, at the commas outside nested braces."""
    items, level, start = [], 0, 0
    for index, character in enumerate(inner):
        if character == "," and not level:
            items.append(inner[start:index])
            start = index + 1
        elif character == "{":
            level += 1
        elif character == "}" and level:
            level -= 1
    return [*items, inner[start:]]


def _count(first: str, last: str, step: int, pattern: str) -> list[str]:
    """From one end to the other: letters, or numbers padded as the wider end, if either is."""
    letters = first.isalpha()
    start, stop = (ord(first), ord(last)) if letters else (int(first), int(last))
    _check_count(abs(stop - start) // step + 1, pattern)
    way = 1 if start <= stop else -1
    numbers = range(start, stop + way, step * way)
    if letters:
        return [chr(number) for number in numbers]
    padded = any(re.match(r"-?0\d", end) for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [f"{number:0{width}d}" for number in numbers]
