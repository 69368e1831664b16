"""Recognition of errors for lack of memory, which torch raises as errors of other kinds."""

from __future__ import annotations

_MESSAGES = (
    "can't allocate memory",  # of the CPU allocator
    "not enough memory",  # of the CPU allocator on Windows
    "out of memory",  # of accelerators
    "Storage size calculation overflowed",
    "Overflow when unpacking long",  # a size beyond 64 bits, which is a TypeError
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, numpy or torch means that memory ran out."""
    if isinstance(error, RuntimeError | TypeError):
        return any(message in str(error) for message in _MESSAGES)
    return isinstance(error, MemoryError)
