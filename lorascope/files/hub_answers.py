"""Limits for a Hugging Face Hub that does not answer, or whose answer does not end."""

from __future__ import annotations

import importlib
import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants, errors, get_session

# Later versions of huggingface_hub use httpx2 instead of httpx.
httpx = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])

ANSWER_SECONDS = 5
"""Seconds to wait for an answer that is not a file."""
# Seconds for which no request is sent after one without an answer, or a command would wait for each of its files.
_SILENT_SECONDS = 60
# An answer may take 15 seconds, and one more per 1,000 bytes; a modem is faster.
_SLOW_SECONDS, _BYTES_PER_SECOND = 15, 1000
# Largest size of an answer that does not state its length, such as a list of files.
_MOST_BYTES = 2**27

_Key = tuple[str, str, str | None]
_waiting: dict[_Key, float] = {}  # requests without an answer in this process, and when they were sent
_downloads: set[_Key] = set()
_header_ends: dict[int, float] = {}  # thread that waits for the headers of an answer -> when they must have come


@contextmanager
def without_retries() -> Iterator[None]:
    """Raise a TimeoutError at the first request that the hub's library repeats, and hide its messages.

    It repeats a request without an answer for a minute, and reports each time. A download that continues after new
    data requests another range, which is not a repetition. After a request without an answer no other request is sent
    for a minute, so that the time limits of several files do not add up. Answers that do not end are errors too.
    """
    hooks = get_session().event_hooks
    if _require_answers in hooks["request"]:  # inside another context
        yield
        return
    log = logging.getLogger("huggingface_hub")
    level = log.level
    hooks["request"].append(_require_answers)
    hooks["response"].append(_note_answer)
    log.setLevel(logging.ERROR)
    _downloads.clear()
    for key, sent in [*_waiting.items()]:
        if time.monotonic() - sent >= _SILENT_SECONDS:
            del _waiting[key]
    try:
        yield
    finally:
        log.setLevel(level)
        hooks["request"].remove(_require_answers)
        hooks["response"].remove(_note_answer)


def _require_answers(request: Any) -> None:
    """Raise a TimeoutError if the hub does not answer, and limit the time of a request."""
    key, now = _key(request), time.monotonic()
    is_download = request.method == "GET" and "/api/" not in request.url.path
    is_silent = any(ANSWER_SECONDS <= now - sent < _SILENT_SECONDS for sent in _waiting.values())
    if is_silent or key in _waiting or (is_download and key in _downloads):
        raise TimeoutError(f"{constants.ENDPOINT} does not answer")
    limits = request.extensions.get("timeout", {})  # transformers asks for the commit without a limit
    for phase, seconds in limits.items():
        limits[phase] = seconds if seconds and is_download else ANSWER_SECONDS
    _waiting[key] = now
    _header_ends[threading.get_ident()] = now + _SLOW_SECONDS
    request.extensions["trace"] = _limit_headers
    if is_download:
        _downloads.add(key)


def _limit_headers(event: str, facts: Any) -> None:
    """Let the reads of a new connection fail once the headers of an answer are late; each byte may come in time."""
    if not event.endswith(("connect_tcp.complete", "start_tls.complete")):
        return
    stream = facts["return_value"]
    read_any = stream.read

    def read(max_bytes: int, timeout: float | None = None) -> Any:
        if time.monotonic() > _header_ends.get(threading.get_ident(), math.inf):
            raise TimeoutError(f"the answer of {constants.ENDPOINT} does not begin")
        return read_any(max_bytes, timeout)

    stream.read = read


def _note_answer(response: Any) -> None:
    _waiting.pop(_key(response.request), None)
    _header_ends.pop(threading.get_ident(), None)
    response.stream = _EndingStream(response)


def _key(request: Any) -> _Key:
    return request.method, str(request.url), request.headers.get("range")


class _EndingStream(httpx.SyncByteStream):
    """Body of an answer; it raises a TimeoutError if the body is too slow or does not end."""

    def __init__(self, response: Any) -> None:
        self._request, self._stream = response.request, response.stream
        self._has_length = "content-length" in response.headers

    def __iter__(self) -> Iterator[bytes]:
        begun, size = time.monotonic(), 0
        try:
            for chunk in self._stream:
                size += len(chunk)
                is_slow = time.monotonic() - begun > _SLOW_SECONDS + size / _BYTES_PER_SECOND
                if is_slow or (size > _MOST_BYTES and not self._has_length):
                    raise TimeoutError(f"the answer of {constants.ENDPOINT} does not end")
                yield chunk
        except (httpx.TimeoutException, TimeoutError):
            _waiting[_key(self._request)] = time.monotonic() - ANSWER_SECONDS  # other files would not come either
            raise

    def close(self) -> None:
        self._stream.close()
