"""Names inside a run folder, and the lazy mapping of its arrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Replaces the checksum of a file that is complete, but still being replaced by newer versions.
GROWING = "growing"
# Replaces the checksum of a file that was deleted to save disk space.
REMOVED = "removed"
PREDICTIONS = "predictions.parquet"
TEXTS = "texts.parquet"


class Lazy(Mapping[str, Any]):
    """Lazy mapping, such as of the arrays in the layout of a run folder, whose values are computed on access."""

    def __init__(self, keys: list[str], make: Callable[[str], Any]) -> None:
        self._keys, self._make = dict.fromkeys(keys), make

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys:
            first = ", ".join(list(self._keys)[:5])
            raise KeyError(f"unknown module {key!r}; expected one of {first} ... ({len(self._keys)} in total)")
        return self._make(key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys  # Mapping would compute the value

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def identify(content: Mapping[str, Any]) -> str:
    """Compute a run id in the layout of runs: the first twelve hex digits of the SHA-256 of canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def snapshot_file(step: int) -> str:
    """Return the name of a step's snapshot file in the layout of a run folder."""
    return f"snapshots/step-{step:06d}.safetensors"
