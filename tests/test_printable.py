"""Escaping of untrusted text for terminals."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorascope.files.printable import count_phrase, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("encoder.layer.0", "encoder.layer.0"),
        ("Größe 大 می\u200cخواهم", "Größe 大 می\u200cخواهم"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\r\nb\x00\x07\x08\x9b", r"a\r\nb\x00\x07\x08\x9b"),
        ("\u202egnp", r"\u202egnp"),
        ("\udcff", r"\udcff"),
        (None, "None"),
    ],
)
def test_printable_escapes_control_characters(text, shown):
    assert printable(text) == shown


@given(st.text(st.characters()))
def test_printable_leaves_only_printable_characters(text):
    shown = printable(text)
    shown.encode("utf-8")
    assert not {unicodedata.category(letter) for letter in shown.replace("\u200c", "").replace("\u200d", "")} & {
        "Cc", "Cf", "Cs", "Zl", "Zp",
    }  # fmt: skip
    assert printable(shown) == shown


@pytest.mark.parametrize(("number", "phrase"), [(0, "0 runs"), (1, "1 run"), (2, "2 runs"), (1200, "1,200 runs")])
def test_nouns_agree_with_their_number(number, phrase):
    assert count_phrase(number, "run") == phrase
