"""The pages of a listing of S3: one after the other, and of a long one many at once.

A page has 1,000 objects, takes tens of milliseconds, and says where the next one begins: a million
objects would be half a minute of waiting. So what is left after the first pages is divided, at
names between two others (StartAfter), and each range that turns out to hold more than a page is
divided again, as long as requests are free.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import reduce
from itertools import takewhile
from typing import Any
from xml.etree import ElementTree

from pipeline.errors import StorageError

AT_ONCE = 16  # pages
FIRST_PAGES = 2  # before a listing is divided
_DIGITS = 16  # characters, behind what two names share, in which the middle is sought

Page = dict[str, Any]
"""`Contents` (Key, Size, ETag), `CommonPrefixes` (Prefix), IsTruncated, NextContinuationToken."""
Ask = Callable[..., Page]
"""Request a page: ask(StartAfter=...), ask(ContinuationToken=...), or ask() for the first."""


def list_pages(ask: Ask, prefix: str, *, ordered: bool = True) -> Iterator[Page]:
    """The pages of the listing of a prefix, in any order; each name is on one of them.

    `ordered`: whether the server lists keys in their order, as S3 does except in directory buckets.
    One whose first pages are out of order, or that does not start where it is asked to, is asked
    page after page.
    """
    more: dict[str, str] = {}
    seen: list[str] = []
    for _ in range(FIRST_PAGES):
        page = ask(**more)
        yield page
        more, seen = _next(page), seen + _names(page)
        if not more:
            return
    divided = 0
    if ordered and len(seen) > 1 and _is_sorted(seen):
        try:
            for page in _divided(ask, prefix, seen):
                yield page
                divided += 1
            return
        except _OutOfOrderError:
            if divided:
                raise
    while more:
        page = ask(**more)
        yield page
        more = _next(page)


class _OutOfOrderError(StorageError):
    """A page does not hold the names after the one asked for."""


@dataclass
class _Range:
    """Names after `start` up to `end`, which is included; None is the end of the listing."""

    start: str
    end: str | None
    at: str = field(init=False)
    """The last name seen."""
    more: dict[str, str] = field(init=False)
    """Parameters of the next request."""
    is_long: bool = field(init=False, default=False)
    """Whether it went on behind the last page; not known of a range just divided."""

    def __post_init__(self) -> None:
        self.at, self.more = self.start, {"StartAfter": self.start}

    def take(self, page: Page) -> Page:
        """The page without names outside. Raises _OutOfOrderError."""
        names = _names(page)
        early = names[: bisect_right(names, self.at)]
        below = {found["Prefix"] for found in page.get("CommonPrefixes", [])} if early else set()
        # Names below a prefix may be before the start, and others behind it.
        if not _is_sorted(names) or any(
            name not in below or not self.at.startswith(name) for name in early
        ):
            raise _OutOfOrderError("the storage does not list its objects in order")
        self.more, self.at = _next(page), max([self.at, *names[-1:]])
        self.is_long = bool(self.more) and (self.end is None or self.at < self.end)
        return self._cut(page) if early or (self.end is not None and self.at > self.end) else page

    def _cut(self, page: Page) -> Page:
        return {
            kind: [
                found
                for found in page.get(kind, [])
                if self.start < found[name] and (self.end is None or found[name] <= self.end)
            ]
            for kind, name in (("Contents", "Key"), ("CommonPrefixes", "Prefix"))
        }

    def divide(self, prefix: str, alphabet: list[str]) -> _Range | None:
        """Cut off the upper half of what was not seen yet; None if there is no name between."""
        middle = between(self.at, self.end, prefix, alphabet)
        if middle is None:
            return None
        upper = _Range(middle, self.end)
        self.end, self.is_long = middle, False
        return upper


def _divided(ask: Ask, prefix: str, seen: list[str]) -> Iterator[Page]:
    """The pages behind the names seen."""
    ranges = [_Range(seen[-1], None)]
    # Most often the names behind begin as those that were seen, and these are all.
    if seen[-1] < (alike := f"{_shared(seen[0], seen[-1])}~"):
        ranges = [_Range(seen[-1], alike), _Range(alike, None)]
    alphabet = sorted(set().union(*seen))
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        asked = {pool.submit(ask, **each.more): each for each in ranges}
        while asked:
            for future in wait(asked, return_when=FIRST_COMPLETED)[0]:
                each = asked.pop(future)
                yield each.take(future.result())
                if each.is_long:
                    asked[pool.submit(ask, **each.more)] = each
            for each in [each for each in asked.values() if each.is_long]:
                if len(asked) < AT_ONCE and (new := each.divide(prefix, alphabet)):
                    asked[pool.submit(ask, **new.more)] = new
    finally:
        pool.shutdown(cancel_futures=True)


def between(low: str, high: str | None, prefix: str, alphabet: list[str]) -> str | None:
    """A name about in the middle of two, of the characters in `alphabet`; None if there is none.

    Both begin with `prefix`; `high` None is behind all that do.
    """
    shared = prefix if high is None else _shared(low, high)
    base = len(alphabet)

    def number(name: str) -> int:
        digits = [bisect_left(alphabet, c) for c in name[len(shared) :][:_DIGITS].ljust(_DIGITS)]
        return reduce(lambda so_far, digit: so_far * base + digit, digits, 0)

    value = (number(low) + (base**_DIGITS - 1 if high is None else number(high))) // 2
    name = ""
    for place in range(_DIGITS - 1, -1, -1):
        name += alphabet[min(value // base**place, base - 1)]
        value %= base**place
        if low < shared + name and (high is None or shared + name < high):
            return shared + name
    return None


def _shared(one: str, other: str) -> str:
    """The common start of two names."""
    same = takewhile(bool, (a == b for a, b in zip(one, other, strict=False)))
    return one[: sum(same)]


def _next(page: Page) -> dict[str, str]:
    """Parameters of the request for the page behind; none where it was the last."""
    if not page.get("IsTruncated"):
        return {}
    return {"ContinuationToken": page["NextContinuationToken"]}


def _names(page: Page) -> list[str]:
    """Keys and prefixes in the order of their names."""
    keys = [found["Key"] for found in page.get("Contents", [])]
    below = [found["Prefix"] for found in page.get("CommonPrefixes", [])]
    if below and _is_sorted(keys) and _is_sorted(below):
        return sorted(keys + below)
    return keys + below


def _is_sorted(names: list[str]) -> bool:
    return names == sorted(names)


def parse_page(
    response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any
) -> None:
    """Read the XML of a page, as a handler of botocore's event before-parse.

    botocore itself takes ten times as long: it makes a date of each object. It gets to see what is
    left of the page without its objects; of anything unusual all of it.
    """
    if response_dict["status_code"] != 200:
        return
    with contextlib.suppress(ElementTree.ParseError, TypeError, ValueError):
        root = ElementTree.fromstring(response_dict["body"])
        space = root.tag.removesuffix("ListBucketResult")
        if space == root.tag:
            return
        contents, below, rest = [], [], []
        for element in root:
            if element.tag == f"{space}Contents":
                found = {name: element.findtext(f"{space}{name}") for name in ("Key", "ETag")}
                size = int(element.findtext(f"{space}Size", "?"))
                contents.append({**found, "Size": size})
            elif element.tag == f"{space}CommonPrefixes":
                below.append({"Prefix": element.findtext(f"{space}Prefix")})
            else:
                rest.append(element)
        root[:] = rest
        response_dict["body"] = ElementTree.tostring(root)
        customized_response_dict.update(Contents=contents, CommonPrefixes=below)
