"""Tokens of a base model whose embeddings are nearest to the vectors of a trained prompt."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from lorascope.array_types import Float, Int
from lorascope.files.file_names import folder_of
from lorascope.files.printable import first_of, printable
from lorascope.files.typed_json import read_json
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.schema.module_roles import parse
from lorascope.updates.linalg import as_float64

_BLOCK = 2**22  # values of the embedding in memory at once
_MAX_LISTED = 20


class _Vocabulary(msgspec.Struct, frozen=True):
    """Tokens in ``tokenizer.json``, with their ids or in the order of them."""

    vocab: dict[str, int] | list[tuple[str, float]]


class _Tokenizer(msgspec.Struct, frozen=True):
    model: _Vocabulary


def describe_nearest(prompt: Float[np.ndarray, "tokens width"], base: PretrainedWeights) -> str:
    """Return the nearest token of each vector of a prompt, by cosine: its id, its text if known, and the cosine."""
    width = prompt.shape[1]
    embeddings = (name for name in base.all_modules() if parse(name).role == "embed")
    lengths = {name: base.shape(name)[0] for name in embeddings if base.shape(name)[1] == width}
    if not lengths:
        return f"the base has no embedding of width {width}"
    # Other embeddings of this width may be those of positions, which are fewer.
    ids, cosines = _nearest_rows(prompt, base, max(lengths, key=lengths.__getitem__))
    texts = _texts(base)
    tokens = []
    for row, cosine in zip(ids, cosines, strict=True):
        token = f"{row}{texts.get(int(row), '')} ({cosine:.2f})"
        tokens.append(token if np.isfinite(cosine) else "none")
    return f"nearest tokens of the base (cosine): {first_of(tokens, _MAX_LISTED)}"


def _nearest_rows(
    vectors: Float[np.ndarray, "tokens width"], base: PretrainedWeights, module: str
) -> tuple[Int[np.ndarray, "tokens"], Float[np.ndarray, "tokens"]]:
    """Return the row of a weight with the largest cosine to each vector, and that cosine.

    The weight is read in blocks of rows. The cosine is -inf for vectors and rows that are zero or not finite.
    """
    table = base.unread(module)
    rows, best = np.zeros(len(vectors), int), np.full(len(vectors), -np.inf)
    with np.errstate(all="ignore"):  # vectors may be zero, and their cosines are replaced below
        unit = as_float64(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True)
        step = max(1, _BLOCK // table.shape[1])
        for first in range(0, table.shape[0], step):
            block = as_float64(table[first : first + step].read())
            cosines = unit @ (block / np.linalg.norm(block, axis=1, keepdims=True)).T
            cosines = np.where(np.isfinite(cosines), cosines, -np.inf)
            nearest = cosines.argmax(axis=1)
            values = np.take_along_axis(cosines, nearest[:, None], 1)[:, 0]
            rows, best = np.where(values > best, first + nearest, rows), np.maximum(best, values)
    return rows, best


def _texts(base: PretrainedWeights) -> dict[int, str]:
    """Return the quoted text of every token, from the base's tokenizer; {} if it has none that can be read."""
    file = folder_of(base.folder) / "tokenizer.json"
    try:
        vocabulary: Any = read_json(file, _Tokenizer).model.vocab
    except (OSError, ValueError):
        return {}
    if isinstance(vocabulary, list):
        vocabulary = {text: row for row, (text, _) in enumerate(vocabulary)}
    return {row: f" {printable(repr(text))}" for text, row in vocabulary.items()}
