"""Reader of PEFT TRAINABLE_TOKENS folders: new rows of some tokens in an embedding or a head.

``trainable_tokens_delta`` (tokens, width) contains the new rows themselves, in the order of ``token_indices`` in the
configuration. The update, which is zero in all other rows, requires the base model. A head that is tied to the
embedding has the same rows, which PEFT stores twice.

Source: PEFT 0.21, ``TrainableTokensLayer``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.files.printable import printable
from lorascope.files.typed_json import Count, to_typed, unreadable
from lorascope.formats.peft_config import CONFIG, peft_kind
from lorascope.formats.peft_factors import Factors, check_shapes, peft_factors
from lorascope.formats.pretrained_weights import OptionalBase, PretrainedWeights, named_base, require_base
from lorascope.formats.readers import Config, WeightFiles, reads
from lorascope.formats.stored_update import AdapterFiles, StoredTensor, StoredUpdate
from lorascope.schema.module_roles import parse
from lorascope.updates import Dense, LowRank, Update
from lorascope.updates.linalg import as_float64

_ROWS = "trainable_tokens_delta"


class TokenIndices(msgspec.Struct, frozen=True):
    """Setting of a TRAINABLE_TOKENS adapter: the tokens of the stored rows."""

    token_indices: list[Count] = []


@dataclass(frozen=True)
class TokenRows(StoredUpdate):
    """Stored update of an embedding or a head with new rows of some tokens."""

    rows: StoredTensor
    tokens: tuple[int, ...]
    module: str
    base: PretrainedWeights
    transposed: bool

    scale = 1.0
    copies_weight = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape(self.module, self.transposed)

    @property
    def has_thin_factors(self) -> bool:
        return self.rank < min(self.shape)

    @property
    def rank(self) -> int:
        return min(len(set(self.tokens)), *self.shape)

    def factors(self) -> dict[str, Any]:
        return {"rows": self.rows.read()}

    def update(self) -> Update:
        """Return the update as a product with one component per token, or as a matrix if it has all components."""
        # PEFT copies the last row of a token that occurs twice.
        positions = {token: position for position, token in enumerate(self.tokens)}
        tokens, rows = list(positions), as_float64(self.rows.read())[list(positions.values())]
        changes = rows - as_float64(np.asarray(self.base.unread(self.module)[tokens]))
        stored_shape = self.base.shape(self.module)
        if not self.has_thin_factors:
            matrix = np.zeros(stored_shape)
            matrix[tokens] = changes
            return Dense(matrix.T if self.transposed else matrix)
        selection = np.zeros((stored_shape[0], len(tokens)), np.float32)
        selection[tokens, range(len(tokens))] = 1
        if self.transposed:
            return LowRank(changes.T, selection.T)
        return LowRank(selection, changes)


@reads(lambda config, names: peft_kind(config) == "TRAINABLE_TOKENS", "TRAINABLE_TOKENS (PEFT)", needs="base")
def read_trainable_tokens(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> AdapterFiles:
    """Read the modules of a PEFT TRAINABLE_TOKENS folder."""
    tokens = tuple(to_typed(config, TokenIndices, path / CONFIG).token_indices)
    weights = require_base(path, config, base, "TRAINABLE_TOKENS changes the weights of its base")
    module_tensors, other_names = peft_factors(path, files, [_ROWS])
    ties = _tied_modules(module_tensors, weights)
    updates = {}
    for module, tensors in module_tensors.items():
        if module in ties:
            continue
        if not weights.has_weight(module):
            raise unreadable(path, f"the base has no weight of {printable(module)}, and no other module has its rows")
        count, width = weights.shape(module)
        check_shapes(path, module, tensors, {_ROWS: f"{len(tokens)} {width}"})
        if max(tokens) >= count:
            must = f"token_indices must be < {count}, the rows of {printable(module)} in the base"
            raise unreadable(path, f"{must}, got {max(tokens)}: pass the base with its resized vocabulary")
        updates[module] = TokenRows(tensors[_ROWS], tokens, module, weights, parse(module).role == "embed")
    notes = []
    for head, module in ties.items():
        notes.append(f"{printable(head)} is tied to {printable(module)}: their update is one, and is counted once")
    configured = dict(zip(ties, ties, strict=True))
    needs_base, kind = named_base(config) is None, "TRAINABLE_TOKENS"
    return AdapterFiles(path, dict(config), updates, other_names, files, kind, needs_base, tuple(notes), configured)


def _tied_modules(module_tensors: Mapping[str, Factors], weights: PretrainedWeights) -> dict[str, str]:
    """Return modules that the base stores only under the name of another module with the same rows, and that name."""
    ties = {}
    for module, tensors in module_tensors.items():
        if weights.has_weight(module):
            continue
        for other, other_tensors in module_tensors.items():
            if weights.has_weight(other) and np.array_equal(tensors[_ROWS].read(), other_tensors[_ROWS].read()):
                ties[module] = other
    return ties
