"""Check of the tensors of a merged model that have no update: biases, norms, embeddings, heads and buffers.

A tensor that was trained and saved with the adapter must be in the merged model; all others must be those of the base.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np

from lorascope.array_types import Float32
from lorascope.files.safetensors_io import FLOATS
from lorascope.files.small_floats import round_to_dtype
from lorascope.formats.image_names import BaseNames, swaps_halves
from lorascope.formats.peft_whole_weights import WholeWeight, whole_weights
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.adapter import Adapter

TensorVerdict = Literal["kept", "saved", "lost", "changed", "missing", "added", "not compared"]
# Constants that checkpoints of old versions of transformers contain, and new versions compute.
_BUFFERS = re.compile(r"(^|\.)(position_ids|token_type_ids|inv_freq|masked_bias|attn\.bias|attention\.bias)$")
# Tensors of a module that whole weights of an adapter change; PEFT does not apply the other kinds.
_ENDS: dict[str, str] = {
    **dict.fromkeys(("full", "tokens"), "weight"),
    **dict.fromkeys(("bias", "bias update", "bias difference"), "bias"),
}
_LN_TUNING = ".ln_tuning_layers"
_SCALES_BIASES = ("IA3", "ROAD")  # PEFT merges them into the biases of adapted modules as well


@dataclass(frozen=True)
class ComparedTensor:
    """Comparison of a tensor without an update with that of the base, or with the one saved with the adapter.

    Parameters
    ----------
    name : str
        Name in the files of the base; in those of the merged model if only that has it.
    verdict : str
        ``"kept"`` equals the base, ``"saved"`` equals the adapter's tensor, ``"lost"`` does not, although the adapter
        has one. ``"changed"``, ``"missing"`` and ``"added"`` differ from the base. ``"not compared"`` belongs to a head
        that only one of the models has, or to a bias that the adapter scales or stores together with others.
    """

    name: str
    verdict: TensorVerdict


def compare_tensors(adapter: Adapter, merged: PretrainedWeights) -> Iterator[ComparedTensor]:
    """Yield the comparison of every tensor of both models that has no update, one tensor at a time.

    Equal means bit by bit, after rounding to the dtype of the merged model.

    Parameters
    ----------
    adapter : Adapter
        Opened with its base.
    merged : PretrainedWeights
        The merged model, by the names of the base.
    """
    comparison = _Comparison(adapter, merged)
    yield from comparison.of_base()
    yield from comparison.of_merged()


class _Comparison:
    """Tensors of a base, of an adapter and of a merged model."""

    def __init__(self, adapter: Adapter, merged: PretrainedWeights) -> None:
        assert adapter.base is not None
        self.adapter, self.base, self.merged = adapter, adapter.base, merged
        self.adapted = set(chain.from_iterable(map(self.base.stored_names, adapter.files.parts)))
        self.saved: dict[str, WholeWeight] = {}
        # Tensors with only some rows of a saved one, or its rows in another order.
        self.divided: set[str] = set()
        # Only adapters of image models have other names than the model.
        flat_names = BaseNames(self.base.all_modules() if "spelling" in adapter.files.config else ())
        for weight in whole_weights(adapter.files):
            end = _ENDS.get(weight.kind)
            if end is None:
                continue
            module = weight.module.removesuffix(_LN_TUNING)
            modules = flat_names.find(module) or (module,)
            targets = [self._in_base(f"{name}.{end}") for name in modules]
            if len(targets) > 1 or swaps_halves(module, modules[0]):
                self.divided.update(targets)
            else:
                self.saved[targets[0]] = weight
        # Base and merged model may have other heads: one of masked language modeling and one of classes.
        same_class = self.base.architectures == merged.architectures
        self.unexplained: tuple[TensorVerdict, TensorVerdict] = ("not compared", "not compared")
        if same_class:
            self.unexplained = ("missing", "added")
        self.visited: set[str] = set()

    def _in_base(self, tensor: str) -> str:
        """Return the name of a tensor in the files of the base; the given one if it has no such tensor."""
        name = self.base.find_tensor(tensor)
        return tensor if name is None else self.base.in_files(name)

    def of_base(self) -> Iterator[ComparedTensor]:
        """Yield the comparison of every tensor of the base without an update."""
        for name in self.base.tensor_names():
            merged_name = self._in_merged(name)
            if merged_name is not None:
                self.visited.add(self.merged.in_files(merged_name))
            if name in self.adapted:
                continue
            if merged_name is not None:
                yield ComparedTensor(name, self._verdict(name, merged_name))
            elif not self._is_stored_otherwise(name):
                yield ComparedTensor(name, self.unexplained[0])

    def of_merged(self) -> Iterator[ComparedTensor]:
        """Yield the comparison of every tensor that only adapter or merged model have."""
        for name, weight in self.saved.items():
            if self.base.find_tensor(name) is not None:
                continue
            merged_name = self.merged.find_tensor(name)
            if merged_name is not None:
                self.visited.add(self.merged.in_files(merged_name))
                yield ComparedTensor(name, self._verdict(name, merged_name))
            elif not self._is_saved_twice(weight):
                yield ComparedTensor(name, "lost")
        for name in self.merged.tensor_names():
            if name not in self.visited and not self._is_copy(name):
                yield ComparedTensor(name, self.unexplained[1])

    def _in_merged(self, name: str) -> str | None:
        """Return the name in the merged model of a tensor of the base."""
        names = (self.merged.find_tensor(tree_name) for tree_name in (name, *self.base.tree_names(name)))
        return next(filter(None, names), None)

    def _verdict(self, name: str, merged_name: str) -> TensorVerdict:
        if name in self.divided:
            return "not compared"
        weight = self.saved.get(name)
        peft_type = self.adapter.files.config.get("peft_type")
        module = name.removesuffix(".bias")
        if module != name and peft_type in _SCALES_BIASES and f"{module}.weight" in self.adapted:
            return "not compared"
        is_kept = self.base.find_tensor(name) is not None and _is_equal(self.base, name, self.merged, merged_name)
        if weight is None:
            return "kept" if is_kept else "changed"
        file = self.merged.file(merged_name)
        after = np.asarray(file[merged_name], np.float32)
        expected = self._expected(name, weight)
        if expected.size == after.size:
            rounded = round_to_dtype(expected, file.dtype(merged_name)).reshape(after.shape)
            if np.array_equal(rounded, after, equal_nan=True):
                return "saved"
        return "lost" if is_kept else "changed"

    def _expected(self, name: str, weight: WholeWeight) -> Float32[np.ndarray, "..."]:
        """Return what the adapter makes of a tensor: its own values, or a change of those of the base."""
        values = self._values(weight)
        if weight.kind not in ("tokens", "bias update", "bias difference"):
            return values
        if weight.kind == "bias difference" and self.base.find_tensor(name) is None:
            return values
        expected = np.array(self.base.file(name)[name], np.float32)
        if weight.kind == "tokens":
            expected[list(weight.rows)] = values
            return expected
        scale = self.adapter.files.parts[weight.module].scale if weight.kind == "bias update" else 1.0
        return expected + np.float32(scale) * values.reshape(expected.shape)

    @staticmethod
    def _values(weight: WholeWeight) -> Float32[np.ndarray, "..."]:
        return np.asarray(weight.tensor.read(), np.float32)

    def _is_saved_twice(self, weight: WholeWeight) -> bool:
        """Return whether another saved tensor is equal: PEFT saves a head that is tied to the embedding twice."""
        other_weights = (other for other in self.saved.values() if other is not weight)
        return any(np.array_equal(self._values(other), self._values(weight)) for other in other_weights)

    def _is_stored_otherwise(self, name: str) -> bool:
        """Return whether a tensor that the merged model lacks is a constant, or tied to another one that it has."""
        if _BUFFERS.search(name):
            return True
        if len(self.base.file(name).shape(name)) < 2:  # only matrices are tied, while norms may be equal by chance
            return False
        names = (other for other in self.base.tensor_names() if other != name)
        return any(_is_equal(self.base, name, self.base, other) for other in names if self._in_merged(other))

    def _is_copy(self, name: str) -> bool:
        """Return whether a tensor that the base lacks is a constant, or equals another one of the merged model."""
        if _BUFFERS.search(name):
            return True
        if len(self.merged.file(name).shape(name)) < 2:
            return False
        return any(_is_equal(self.merged, name, self.merged, other) for other in self.visited)


def _is_equal(base: PretrainedWeights, name: str, merged: PretrainedWeights, merged_name: str) -> bool:
    """Return whether two tensors have the same shape, and the same bits after rounding to the dtype of the second."""
    before, after = base.file(name), merged.file(merged_name)
    if before.shape(name) != after.shape(merged_name):
        return False
    dtype, merged_dtype = before.dtype(name), after.dtype(merged_name)
    if dtype == merged_dtype:  # bits, because NaN is not equal to itself
        return np.array_equal(before.bits(name), after.bits(merged_name))
    if dtype not in FLOATS or merged_dtype not in FLOATS:
        return False
    expected = round_to_dtype(np.asarray(before[name], np.float32), merged_dtype)
    return np.array_equal(expected, np.asarray(after[merged_name], np.float32), equal_nan=True)
