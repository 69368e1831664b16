"""Math between dollar signs in the titles and labels of a figure, and its form without a typesetter of TeX.

Texts that an author writes for a figure contain math: titles, captions, and labels of axes, color bars, rules and
categories. Words in cells and at points do not.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from html import escape, unescape

# As in pandoc, so that "$5 to $6" is not math: no space inside the dollar signs, and no digit after them.
MATH = re.compile(r"\$(?!\s)([^$\n]{1,200}?)(?<!\s)\$(?!\d)")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\s+|.")
_SYMBOLS = {
    **{"|": "‖", "cdot": "·", "times": "×", "pm": "±", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠"},
    **{"approx": "≈", "sim": "∼", "propto": "∝", "infty": "∞", "sum": "∑", "prod": "∏", "partial": "∂", "nabla": "∇"},
    **{"top": "⊤", "to": "→", "in": "∈", "ell": "ℓ", "odot": "⊙", "otimes": "⊗", "ldots": "…", "dots": "…", "%": "%"},
    # The letters of Unicode have the form of varepsilon and varphi.
    **{"epsilon": "ϵ", "varepsilon": "ε", "phi": "ϕ", "varphi": "φ"},
    **{"quad": " ", ",": " ", " ": " ", "}": "}"},
    **{"{": "&#123;"},  # plotly replaces what follows "%{"
    **{name: name for name in ("log", "exp", "min", "max", "dim", "ln", "det", "tr")},
}
_FONTS = {"mathrm": "", "text": "", "operatorname": "", "mathbf": "b", "mathit": "i"}
_ALPHABETS = {"mathcal": "SCRIPT", "mathbb": "DOUBLE-STRUCK"}
_SIZES = ("left", "right")  # of the bracket that follows
_ACCENTS = {"hat": "\u0302", "bar": "\u0304", "tilde": "\u0303"}
_SCRIPTS = {"^": "sup", "_": "sub"}
_ONE_SYMBOL = re.compile(r"[\d.]+|.[\u0300-\u036f]?")
_TAGGED = re.compile(r"<(sub|sup)>([^<]*)</\1>")
# Characters that Unicode has as scripts, and these scripts.
_UNICODE = {
    "sub": str.maketrans("0123456789+−=()aehijklmnoprstuvxβγρφχ", "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓᵦᵧᵨᵩᵪ"),
    "sup": str.maketrans("0123456789+−=()in⊤T", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁱⁿᵀᵀ"),
}
_MARKS = {"sub": "_", "sup": "^"}


def replace_math(text: str, of_text: Callable[[str], str], of_math: Callable[[str], str]) -> str:
    """Return a text with its math and the text around it replaced; math that ``of_math`` rejects is text."""
    plain, *pieces = MATH.split(text)
    replaced = of_text(plain)
    for math, plain in zip(pieces[::2], pieces[1::2], strict=True):
        try:
            replaced += of_math(math)
        except (ValueError, RecursionError):  # braces may be nested without end
            replaced += of_text(f"${math}$")
        replaced += of_text(plain)
    return replaced


def math_to_unicode(text: str) -> str:
    """Return a text whose math is plain Unicode, such as W₀; scripts that Unicode lacks follow "_" or "^"."""
    return replace_math(text, str, _unicode_of_math)


def _unicode_of_math(math: str) -> str:
    tagged = re.sub("</?[bi]>", "", tags_of_math(math))
    while (plain := _TAGGED.sub(_unicode_script, tagged)) != tagged:
        tagged = plain
    return unescape(tagged)


def _unicode_script(tagged: re.Match[str]) -> str:
    kind, script = tagged.groups()
    if all(ord(character) in _UNICODE[kind] for character in script):
        return script.translate(_UNICODE[kind])
    return _MARKS[kind] + script


def tags_of_math(math: str) -> str:
    """Return math with the tags i, b, sub and sup.

    Raises
    ------
    ValueError
        It contains a command that has no such form, or braces that do not match.
    """
    tokens = _TOKEN.findall(math)[::-1]
    tagged = []
    while tokens:
        tagged.append(_tag_next(tokens))
    return "".join(tagged)


def _tag_next(tokens: list[str], tag: str = "i") -> str:
    """Return the next symbol or group with tags, and remove it from the end of ``tokens``; ``tag`` is of letters."""
    if not tokens:
        raise ValueError("math must not end here")
    token = tokens.pop()
    name = token.removeprefix("\\")
    if token in _SCRIPTS:
        return f"<{_SCRIPTS[token]}>{_tag_next(tokens, tag)}</{_SCRIPTS[token]}>"
    if token == "{":
        inner = ""
        while tokens and tokens[-1] != "}":
            inner += _tag_next(tokens, tag)
        if not tokens:
            raise ValueError("braces of math must match")
        tokens.pop()
        return inner
    if token == "}":
        raise ValueError("braces of math must match")
    if not token.startswith("\\"):
        if token.isalpha() and tag:
            return f"<{tag}>{escape(token)}</{tag}>"
        return escape(token.strip().replace("-", "−"))
    if name in _SYMBOLS:
        return _SYMBOLS[name]
    if name in _FONTS:
        return _tag_next(tokens, _FONTS[name])
    if name in _SIZES:
        return ""
    if name == "frac":
        return f"{_in_brackets(_tag_next(tokens, tag))}/{_in_brackets(_tag_next(tokens, tag))}"
    if name == "sqrt":
        if tokens and tokens[-1] == "[":
            raise ValueError("only square roots have a form without a typesetter")
        return f"√{_in_brackets(_tag_next(tokens, tag))}"
    if name in _ALPHABETS:
        return "".join(_letter_of(character, _ALPHABETS[name]) for character in _tag_next(tokens, ""))
    if name in _ACCENTS:
        accented = _tag_next(tokens, "")
        return f"<i>{accented}{_ACCENTS[name]}</i>"
    return _greek_letter(name)


def _in_brackets(tagged: str) -> str:
    """Return a part of a fraction or of a root, in brackets unless it is one symbol, which may have scripts."""
    symbols = unescape(re.sub("</?[bi]>", "", _TAGGED.sub("", tagged)))
    return tagged if _ONE_SYMBOL.fullmatch(symbols) else f"({tagged})"


def _letter_of(character: str, alphabet: str) -> str:
    """Return a capital letter of an alphabet, or the italic one if Unicode has it only where few fonts do."""
    try:
        return unicodedata.lookup(f"{alphabet} CAPITAL {character}")
    except KeyError:
        return f"<i>{escape(character)}</i>"


def _greek_letter(name: str) -> str:
    """Return the Greek letter of a command. Raise ValueError if there is none."""
    case = "CAPITAL" if name[:1].isupper() else "SMALL"
    try:
        return unicodedata.lookup(f"GREEK {case} LETTER {name.replace('ambda', 'amda')}")  # spelled so in Unicode
    except KeyError:
        raise ValueError(f"unknown command of math: {name}") from None
