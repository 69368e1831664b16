"""Matching of module names: PEFT's patterns, which other people wrote, and names whose first parts are missing."""

from __future__ import annotations

import re
import time
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Iterator

import regex

from lorascope.files.printable import printable

MAX_MATCHES = 10_000_000
"""Patterns times modules: half a minute."""
MAX_SECONDS = 0.5
"""For the patterns that can backtrack."""
_MAX_KEY = 1000
# Only with these an expression can take exponential time.
_BACKTRACKS = re.compile(r"[*+?{|]")
# The module regex writes counted repetitions out: nested ones take any amount of memory.
_EXPANDS = re.compile(r"\)\s*\{|\{[^}]*\d{3}")


class Patterns:
    """Keys of a ``rank_pattern`` or its kind, which PEFT matches as expressions of the end of a module's name.

    Parameters
    ----------
    keys : iterable of str
    name : object
        Their place, for errors.

    Raises
    ------
    ValueError
        A key is not a regular expression, or too long or nested to match.
    """

    def __init__(self, keys: Iterable[str], name: object) -> None:
        self._name, self._left, self._seconds = name, MAX_MATCHES, MAX_SECONDS
        self._patterns = {key: self._compile(key) for key in keys}

    def _compile(self, key: str) -> re.Pattern[str] | regex.Pattern[str]:
        whole = rf"(.*\.)?({key})$"
        try:
            if len(key) > _MAX_KEY or _EXPANDS.search(key):
                raise ValueError("a repeated group, or a count above 99")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                pattern = re.compile(whole)
                return regex.compile(whole) if _BACKTRACKS.search(key) else pattern
        except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"cannot read {printable(self._name)}: {printable(key[:100])!r} must be a regular expression that ends "
                f"a module's name: {printable(error)}"
            ) from error

    def first(self, module: str) -> str | None:
        """Return the first key that fits a module, as PEFT takes it."""
        return next((key for key in self._patterns if self._is_match(key, module)), None)

    def unused_keys(self, modules: Iterable[str]) -> list[str]:
        """Return the keys that fit none of the modules."""
        names = list(modules)
        return [key for key in self._patterns if not any(self._is_match(key, name) for name in names)]

    def _is_match(self, key: str, module: str) -> bool:
        """Return whether a key fits, within the limits that all matches share."""
        self._left -= 1
        pattern = self._patterns[key]
        found = (
            pattern.match(module) is not None
            if isinstance(pattern, re.Pattern)
            else self._is_timed_match(pattern, module)
        )
        if self._left < 0 or self._seconds <= 0:
            raise ValueError(
                f"cannot read {printable(self._name)}: matching it against the names of the modules takes too long, at "
                f"{printable(key[:100])!r}"
            )
        return found

    def _is_timed_match(self, pattern: regex.Pattern[str], module: str) -> bool:
        start = time.monotonic()
        try:
            return pattern.match(module, timeout=max(self._seconds, 1e-3)) is not None
        except TimeoutError:
            self._seconds = 0.0
            return False
        finally:
            self._seconds -= time.monotonic() - start


class Ends:
    """Names that are found by their ends.

    Parameters
    ----------
    names : iterable of str
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._reversed = sorted(name[::-1] for name in names)

    def names_with_end(self, end: str) -> Iterator[str]:
        """Yield the names with this end, in no particular order."""
        start = end[::-1]
        for place in range(bisect_left(self._reversed, start), len(self._reversed)):
            if not self._reversed[place].startswith(start):
                return
            yield self._reversed[place][::-1]
