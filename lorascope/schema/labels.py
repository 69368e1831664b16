"""Short descriptions of hyper-parameters and settings for labels."""

from __future__ import annotations

from functools import partial

# Lists with a longer text are shown by their number of items.
_LONG = 60


def to_words(value: object) -> str:
    """Describe a configuration value for a label, in a few words that are the same in every process.

    Callables are shown by name, objects with the default ``repr`` by class, and long lists by length. A mapping is
    shown as the array or run that it refers to, else as ``by module``.
    """
    if isinstance(value, list):
        text = " ".join(map(to_words, value))
        if len(text) <= _LONG:
            return text
        kind = "values"
        if "." in "".join(map(str, value)):  # names of modules are dotted
            kind = "modules"
        return f"{len(value)} {kind}"
    if isinstance(value, dict):
        if "array" in value:
            return f"array {value['array'][:8]}"  # the start of its hash
        return value.get("run", "by module")
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, partial):
        arguments = [*map(to_words, value.args)]
        arguments += [f"{name}={to_words(item)}" for name, item in value.keywords.items()]
        return f"{to_words(value.func)}({', '.join(arguments)})"
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__qualname__.rpartition("<locals>.")[2]
    text = str(value)
    if " at 0x" in text:  # an address differs between processes
        return type(value).__name__
    return text
