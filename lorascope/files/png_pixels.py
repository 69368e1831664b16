"""Digest of the pixels of an image, which does not depend on its metadata and compression."""

from __future__ import annotations

import hashlib
from typing import Any


def pixel_digest(image: Any) -> str:
    """Return the SHA-256 of the size and the pixels of a PIL image, such as a PNG."""
    return hashlib.sha256(f"{image.size}".encode() + image.convert("RGB").tobytes()).hexdigest()
