"""Short descriptions of hyper-parameters and settings for labels."""

from __future__ import annotations

from functools import partial

# Characters of a list, beyond which only its length is given.
_LONG = 60


def to_words(value: object) -> str:
    """Describe a value of a configuration in a few words, the same in every process.

    Parameters
    ----------
    value : object
        A callable gives its name, an object without a text of its own its class, a long list its length, a table
        ``by module`` or the run or array that it stands for.
    """
    if isinstance(value, list):
        text = " ".join(map(to_words, value))
        kind = "modules" if any("." in str(item) for item in value) else "values"
        return text if len(text) <= _LONG else f"{len(value)} {kind}"
    if isinstance(value, dict):
        return f"array {value['array'][:8]}" if "array" in value else value.get("run", "by module")
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, partial):
        given = [*map(to_words, value.args), *(f"{name}={to_words(item)}" for name, item in value.keywords.items())]
        return f"{to_words(value.func)}({', '.join(given)})"
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__qualname__.rpartition("<locals>.")[2]
    text = str(value)
    return type(value).__name__ if " at 0x" in text else text
