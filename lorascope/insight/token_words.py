"""Words of tokenized rows: neighboring tokens that a tokenizer joins when it decodes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lorascope.array_types import Int

_PARTIAL = "\ufffd"  # byte of a character that several tokens encode


class TokenWords(NamedTuple):
    """Words of all tokens of some rows, which are in one sequence.

    Parameters
    ----------
    texts : list of str
        Text of each occurrence.
    is_special : list of bool
        Whether the occurrence is a special token.
    row : array (occurrence,)
        Row of each occurrence.
    occurrence : array (token,)
        Occurrence that each token belongs to.
    """

    texts: list[str]
    is_special: list[bool]
    row: Int[np.ndarray, "occurrence"]
    occurrence: Int[np.ndarray, "token"]


def find_words(tokenizer: Any, rows: Sequence[Sequence[int]]) -> TokenWords:
    """Find the words of tokenized rows.

    A word ends where the tokenizer decodes two tokens with white space between them, and at punctuation.
    """
    special = set(tokenizer.all_special_ids)
    begins: dict[tuple[int, int], bool] = {}
    texts: list[str] = []
    is_special: list[bool] = []
    row_numbers, occurrences = [], []
    for number, tokens in enumerate(rows):
        words: list[list[int]] = []
        for index, token in enumerate(tokens):
            pair = (tokens[index - 1], token)
            # Decoding is slow, and most pairs of tokens occur again.
            if index and special.isdisjoint(pair) and pair not in begins:
                begins[pair] = _begins_word(tokenizer, *pair)
            if not index or begins.get(pair, True):
                words.append([])
            words[-1].append(token)
            occurrences.append(len(texts) + len(words) - 1)
        for word in words:
            texts.append(_decode(tokenizer, word).strip())
            is_special.append(word[0] in special)
            row_numbers.append(number)
    return TokenWords(texts, is_special, np.array(row_numbers), np.array(occurrences))


def _begins_word(tokenizer: Any, previous: int, token: int) -> bool:
    """Return whether a token begins a word after another one."""
    before, pair = _decode(tokenizer, [previous]), _decode(tokenizer, [previous, token])
    if not pair.startswith(before):  # bytes of one character
        return False
    after = pair.removeprefix(before)
    if before[-1:].isspace() or after[:1].isspace():
        return True
    # Tokenizers of bytes split at punctuation without white space.
    letters = before[-1:] + after[:1]
    return not all(letter.isalnum() or letter == _PARTIAL for letter in letters)


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    # Cleaned-up text has no white space before punctuation.
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
