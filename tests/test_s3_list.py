"""Long listings of S3 in ranges at once, over servers of every kind; botocore reads the pages."""

from __future__ import annotations

from collections import Counter
from typing import Any

import botocore.session
import pytest
from botocore.parsers import RestXMLParser
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import StorageError
from pipeline.storage.s3_list import between, list_pages, parse_page


class Server:
    """Lists names below a prefix as S3 does, in pages; `starts_anywhere` as others do."""

    def __init__(
        self, names: list[str], page: int, delimiter: str = "", *, starts_anywhere: bool = False
    ):
        self.names, self.page, self.delimiter = sorted(names), page, delimiter
        self.starts_anywhere, self.requests = starts_anywhere, 0

    def ask(self, **more: str) -> dict[str, Any]:
        self.requests += 1
        token = more.get("ContinuationToken", "")
        after = token or ("" if self.starts_anywhere else more.get("StartAfter", ""))
        entries = sorted({self._entry(name) for name in self.names if name > after})
        entries = [entry for entry in entries if not (token and entry <= after)]
        some, more = entries[: self.page], entries[self.page :]
        below = [name for name in some if self.delimiter and name.endswith(self.delimiter)]
        return {
            "Contents": [{"Key": name} for name in some if name not in below],
            "CommonPrefixes": [{"Prefix": name} for name in below],
            "IsTruncated": bool(more),
            **({"NextContinuationToken": some[-1]} if more else {}),
        }

    def _entry(self, name: str) -> str:
        place = name.find(self.delimiter, 2) if self.delimiter else -1
        return name if place < 0 else name[: place + 1]

    def entries(self) -> set[str]:
        return {self._entry(name) for name in self.names}


def told(server: Server, **options: Any) -> Counter[str]:
    """How often each name was told."""
    pages = list_pages(server.ask, "p/", **options)
    return Counter(
        found.get("Key") or found["Prefix"]
        for page in pages
        for found in (*page.get("Contents", []), *page.get("CommonPrefixes", []))
    )


NAMES = st.lists(
    st.text(st.sampled_from("0159ab/-~\u00e9\U0001f600"), min_size=1, max_size=6).map("p/".__add__),
    unique=True,
    max_size=60,
)


@settings(deadline=None, max_examples=100)
@given(
    names=NAMES,
    page=st.integers(1, 7),
    delimiter=st.sampled_from(["", "/"]),
    starts_anywhere=st.booleans(),
    ordered=st.booleans(),
)
def test_each_name_is_told_once(
    names: list[str], page: int, delimiter: str, starts_anywhere: bool, ordered: bool
) -> None:
    server = Server(names, page, delimiter, starts_anywhere=starts_anywhere)
    assert told(server, ordered=ordered) == Counter(server.entries())


@pytest.mark.parametrize(
    "names",
    [
        [f"p/{i:08}.tar" for i in range(5_000)],
        [f"p/{i:x}-{i * 2654435761 % 2**32:08x}" for i in range(5_000)],
        [f"p/{folder}/{i:04}" for folder in ("train", "validation") for i in range(2_500)],
    ],
)
def test_a_long_listing_is_asked_for_in_ranges(names: list[str]) -> None:
    """Ten ranges at least, for at most twice the requests of one page after the other."""
    server = Server(names, 50)
    starts = 0

    def ask(**more: str) -> dict[str, Any]:
        nonlocal starts
        starts += "StartAfter" in more
        return server.ask(**more)

    found = [f["Key"] for page in list_pages(ask, "p/") for f in page["Contents"]]
    assert sorted(found) == sorted(names)
    assert starts >= 10
    assert server.requests < 2 * len(names) / 50


def test_a_listing_of_two_pages_takes_two_requests() -> None:
    server = Server([f"p/{i}" for i in range(100)], 50)
    assert len(told(server)) == 100
    assert server.requests == 2


def test_a_server_that_loses_its_order_is_refused_rather_than_believed() -> None:
    names = [f"p/{i:04}" for i in range(1_000)]
    server = Server(names, 10)

    def ask(**more: str) -> dict[str, Any]:
        page = server.ask(**more)
        if server.requests > 10:
            page["Contents"].reverse()
        return page

    with pytest.raises(StorageError, match="does not list its objects in order"):
        list(list_pages(ask, "p/"))


@given(
    low=st.text("0159ab", min_size=1, max_size=6),
    high=st.text("0159ab", min_size=1, max_size=6) | st.none(),
)
def test_a_middle_lies_between(low: str, high: str | None) -> None:
    middle = between(f"p/{low}", None if high is None else f"p/{high}", "p/", sorted("0159ab"))
    if middle is not None:
        assert f"p/{low}" < middle
        assert high is None or middle < f"p/{high}"
    if high is not None and low[0] < high[0] and sorted("0159ab").index(high[0]) > 1:
        assert middle is not None


PAGE = """<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name>
<Prefix>p/</Prefix><EncodingType>url</EncodingType><IsTruncated>{truncated}</IsTruncated>
<NextContinuationToken>t&amp;1=</NextContinuationToken>
<Contents><Key>p/a%2Bb&amp;c</Key><LastModified>2026-11-25T12:00:00.000Z</LastModified>
<ETag>&quot;abc&quot;</ETag><Size>12</Size><StorageClass>STANDARD</StorageClass></Contents>
<Contents><Key>p/b</Key><LastModified>2026-11-25T12:00:00.000Z</LastModified>
<ETag>&quot;d-2&quot;</ETag><Size>5368709120</Size></Contents>
<CommonPrefixes><Prefix>p/x/</Prefix></CommonPrefixes></ListBucketResult>"""


@pytest.mark.parametrize("body", [PAGE.format(truncated="true"), PAGE.format(truncated="false")])
def test_a_page_is_read_as_botocore_reads_it(body: str) -> None:
    expected, found = parsed(body), parsed(body, parse_page)
    for name in ("Contents", "CommonPrefixes"):
        wanted = {"Key", "ETag", "Size", "Prefix"}
        expected[name] = [{k: v for k, v in f.items() if k in wanted} for f in expected[name]]
    assert found == expected
    assert expected["Contents"][1]["Size"] == 5368709120


@pytest.mark.parametrize(
    "body",
    [
        "<html><body>busy</body></html>",
        "<ListBucketResult><Contents><Key>a</Key></Contents></ListBucketResult>",
        "<ListBucketResult><Contents><Key>a</Key><Size>x</Size></Contents></ListBucketResult>",
        "<ListBucketResult",
    ],
)
def test_a_page_that_is_none_is_left_to_botocore(body: str) -> None:
    given, more = {"status_code": 200, "body": body.encode()}, {}
    parse_page(given, more)
    assert (given["body"], more) == (body.encode(), {})


def parsed(body: str, handler: Any = None) -> dict[str, Any]:
    model = botocore.session.get_session().get_service_model("s3")
    shape = model.operation_model("ListObjectsV2").output_shape
    given = {"status_code": 200, "headers": {}, "body": body.encode()}
    more: dict[str, Any] = {}
    if handler:
        handler(response_dict=given, customized_response_dict=more, operation_model=None)
    return dict(RestXMLParser().parse(given, shape)) | more
