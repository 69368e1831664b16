"""How things are called inside a run folder, and the mapping through which its arrays are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# In place of the checksum of a file that is whole at any moment, but another one soon.
GROWING = "growing"
# The checksum of a file that was deleted to save disk space.
REMOVED = "removed"


class Lazy(Mapping[str, Any]):
    """A mapping whose values are made when they are asked for."""

    def __init__(self, keys: list[str], make: Callable[[str], Any]) -> None:
        self._keys, self._make = dict.fromkeys(keys), make

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys:
            raise KeyError(
                f"no module {key!r}; there are {', '.join(list(self._keys)[:5])} ... ({len(self._keys)} in all)"
            )
        return self._make(key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys  # without making the value, as a Mapping would to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def identify(parts: Mapping[str, Any]) -> str:
    """The run id: the first twelve hex digits of SHA-256 over canonical JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def snapshot_file(step: int) -> str:
    """Name of a step's snapshot file inside the run folder."""
    return f"snapshots/step-{step:06d}.safetensors"
