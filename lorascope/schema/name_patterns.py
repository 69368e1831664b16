"""Matching of module names: by the patterns of a PEFT configuration, and by suffix.

Patterns come from files of unknown origin, so matching is limited in number and time.
"""

from __future__ import annotations

import re
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from lorascope.files.printable import printable
from lorascope.files.typed_json import unreadable

T = TypeVar("T")

MAX_MATCHES = 10_000_000  # patterns times modules; this many take about half a minute
MAX_SECONDS = 0.5  # total matching time of the patterns that can backtrack
_MAX_KEY = 1000  # characters
# Only expressions with these characters can take exponential time.
_BACKTRACKS = re.compile(r"[*+?{|]")
# The ``regex`` package expands counted repetitions, so nested ones can take unlimited memory.
_EXPANDS = re.compile(r"\)\s*\{|\{[^}]*\d{3}")


def _compile_with_timeout(expression: str) -> Any:
    """Return a pattern of the ``regex`` package, whose methods accept a ``timeout``."""
    import regex  # not at the top, because few adapters have a pattern that needs it

    try:
        return regex.compile(expression)
    except regex.error as error:
        raise ValueError(str(error)) from error


def _compile(key: str, expression: str) -> re.Pattern[str] | Any:
    """Return a pattern for the expression of a key; one of the ``regex`` package if it can backtrack.

    A key that is not a regular expression or exceeds the limits raises a ValueError with the reason.
    """
    if len(key) > _MAX_KEY or _EXPANDS.search(key):
        raise ValueError(f"at most {_MAX_KEY} characters, no counted group and no count above 99")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            pattern = re.compile(expression)
            if not _BACKTRACKS.search(key):
                return pattern
            return _compile_with_timeout(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error


class _Matcher:
    """Counter of matches and of their time, whose limits all patterns that use it share."""

    def __init__(self) -> None:
        self._remaining_matches, self._remaining_seconds = MAX_MATCHES, MAX_SECONDS

    def is_match(self, pattern: re.Pattern[str] | Any, name: str, whole: bool = False) -> bool:
        """Return whether a pattern matches a name from its start, or as a whole; raise a TimeoutError at a limit."""
        self._remaining_matches -= 1
        match: Any = pattern.fullmatch if whole else pattern.match
        if isinstance(pattern, re.Pattern):
            result = match(name)
        else:
            start = time.monotonic()
            result = match(name, timeout=max(self._remaining_seconds, 1e-3))
            self._remaining_seconds -= time.monotonic() - start
        if self._remaining_matches < 0 or self._remaining_seconds <= 0:
            raise TimeoutError
        return result is not None


def full_matches(expression: str, names: Iterable[str]) -> list[str]:
    """Return the names that a regular expression matches as a whole.

    An invalid expression, and one with more than 1000 characters, a counted group, a count above 99 or a long time of
    matching, raises a ValueError with the reason.
    """
    pattern, matcher = _compile(expression, expression), _Matcher()
    try:
        return [name for name in names if matcher.is_match(pattern, name, whole=True)]
    except TimeoutError:
        raise ValueError("matching it with the names of the modules takes too long") from None


class Patterns:
    """Patterns in a setting such as ``rank_pattern``: regular expressions that PEFT matches with ends of module names.

    A key that is not a regular expression, has more than 1000 characters, a counted group or a count above 99 raises a
    ValueError, in which ``name`` is the setting or file.
    """

    def __init__(self, keys: Iterable[str], name: object) -> None:
        self._name, self._matcher = name, _Matcher()
        self._patterns = {key: self._compile(key) for key in keys}

    def _compile(self, key: str) -> re.Pattern[str] | Any:
        try:
            return _compile(key, rf"(.*\.)?({key})$")
        except ValueError as error:
            must = f"{printable(key[:100])!r} must be a regular expression for the end of a module's name"
            raise unreadable(self._name, f"{must}: {printable(error)}") from error

    def first(self, module: str) -> str | None:
        """Return the first key that matches a module, which is the one that PEFT uses."""
        return next((key for key in self._patterns if self._is_match(key, module)), None)

    def unused_keys(self, modules: Iterable[str]) -> list[str]:
        """Return the keys that match none of the modules."""
        names, keys = list(modules), []
        for key in self._patterns:
            if not any(self._is_match(key, name) for name in names):
                keys.append(key)
        return keys

    def _is_match(self, key: str, module: str) -> bool:
        """Return whether a key matches a module; all matches share the limits."""
        try:
            return self._matcher.is_match(self._patterns[key], module)
        except TimeoutError:
            reason = f"matching the pattern {printable(key[:100])!r} with the names of the modules takes too long"
            raise unreadable(self._name, reason) from None


def per_module(source: object, setting: str, default: T, pattern: Mapping[str, T] | None) -> Callable[[str], T]:
    """Return the function from a module's name to a setting: that of the first pattern that matches, or the default.

    ``pattern`` is the setting ``setting`` of the configuration ``source``, such as ``rank_pattern``.
    """
    values = pattern or {}
    keys = Patterns(values, f"{setting} of {source}")

    def value(module: str) -> T:
        key = keys.first(module)
        if key is None:
            return default
        return values[key]

    return value


class Ends:
    """Index of module names by suffix."""

    def __init__(self, names: Iterable[str]) -> None:
        self._reversed = sorted(name[::-1] for name in names)

    def names_with_end(self, end: str) -> Iterator[str]:
        """Yield the names that end in ``end``, in no particular order."""
        start = end[::-1]
        for index in range(bisect_left(self._reversed, start), len(self._reversed)):
            if not self._reversed[index].startswith(start):
                return
            yield self._reversed[index][::-1]
