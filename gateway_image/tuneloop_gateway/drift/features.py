"""A text as a set of hashed words and character trigrams. No text can be read back from it."""

from __future__ import annotations

import re
from typing import TypeAlias
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

BUCKETS = 1 << 15
MAX_CHARS = 8192
_TOKEN = re.compile(r"\w+|[^\w\s]")
_CACHE_SIZE = 200_000
_cache: dict[str, int] = {}

Features: TypeAlias = NDArray[np.uint16]
"""Sorted, unique bucket numbers; each weighs 1/sqrt(their number)."""


def features(text: str) -> Features:
    """Buckets of the lower-cased words, punctuation marks and character trigrams. An empty text is bucket 0."""
    text = text[:MAX_CHARS].lower()
    keys = {"w" + token for token in _TOKEN.findall(text)}
    keys.update({"c" + text[i : i + 3] for i in range(len(text) - 2)})
    if not keys:
        return np.zeros(1, np.uint16)
    return np.unique(np.fromiter(map(_bucket, keys), np.uint16, len(keys)))


def _bucket(key: str) -> int:
    bucket = _cache.get(key)
    if bucket is None:
        if len(_cache) >= _CACHE_SIZE:
            _cache.clear()
        bucket = _cache[key] = crc32(key.encode("utf-8", "surrogatepass")) % BUCKETS
    return bucket
