"""Hashes of the scripts and styles inside an HTML page, for its Content-Security-Policy."""

from __future__ import annotations

import base64
import hashlib
import re


def inline_hashes(page: str, tag: str) -> str:
    """Return the sources that allow all inline elements of a tag without attributes, such as `'sha256-…'`."""
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
