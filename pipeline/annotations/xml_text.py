"""Text inside XML: names are anybody's, and XML has no place for most control characters."""

from __future__ import annotations

import re
from xml.sax.saxutils import escape

_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def xml_text(text: str, *, escaped: bool = True) -> str:
    """The text with a replacement character for each forbidden in XML; escaped for an element."""
    shown = _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
    return escape(shown) if escaped else shown
