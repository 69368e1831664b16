"""Base weights of experts, which a model folder may store in one tensor or one by one.

transformers keeps the experts of a layer in one parameter, ``mlp.experts.gate_up_proj`` (experts, 2 inner, hidden). In
the files of most models every expert has its own weights: ``mlp.experts.3.gate_proj.weight`` and ``up_proj``, whose
rows follow each other in ``gate_up_proj``, or ``block_sparse_moe.experts.3.w1.weight`` and ``w3`` (Mixtral, MiniMax).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lorascope.array_types import Float
from lorascope.formats.pretrained_weights import PretrainedWeights

# Names of a parameter's weights in files with one module per expert; their rows follow each other.
_SINGLE = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}


class ExpertWeights(PretrainedWeights):
    """Pretrained weights of a model, with those of single experts.

    Parameters
    ----------
    weights : PretrainedWeights
    experts : mapping module name -> (str, int)
        Full name of the parameter in transformers and number of the expert.
    """

    def __init__(self, weights: PretrainedWeights, experts: Mapping[str, tuple[str, int]]) -> None:
        vars(self).update(vars(weights))
        self._experts = experts

    def named_alike(self, other: PretrainedWeights) -> PretrainedWeights:
        """Return the weights of another folder by the names of these."""
        return ExpertWeights(super().named_alike(other), self._experts)

    def stored_names(self, module: str) -> list[str]:
        """Return the names in the files of the tensors with the weight of a module or expert; empty if it has none."""
        if module not in self._experts:
            return super().stored_names(module)
        return list(map(self.in_files, self._expert_tensors(module)))

    def _expert_tensors(self, module: str) -> list[str]:
        parameter, expert = self._experts[module]
        parameter = self._names.get(parameter, parameter)
        joined = self.find_tensor(parameter)
        if joined is not None:
            shape = self.file(joined).shape(joined)
            return [joined] if len(shape) == 3 and expert < shape[0] else []
        above, _, leaf = parameter.rpartition(".")
        for leaves in _SINGLE.get(leaf, ()):
            names = [self.find_tensor(f"{above}.{expert}.{name}.weight") or "" for name in leaves]
            if all(names):
                return names
        return []

    def stored_shape(self, module: str) -> tuple[int, ...]:
        """Return the stored shape of a weight, or of that of one expert."""
        if module not in self._experts or not (names := self._expert_tensors(module)):
            return super().stored_shape(module)
        shapes = [self.file(name).shape(name)[-2:] for name in names]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def weight(self, module: str, shape: tuple[int, int], transposed: bool = False) -> Float[np.ndarray, "out in"]:
        """Load the weight of a module or expert; see `PretrainedWeights.weight`.

        Square experts stored as (in, out), as in gpt-oss, are recognized by the other parameter of their module.
        """
        return super().weight(module, shape, transposed or self._has_inputs_first(module))

    def _has_inputs_first(self, module: str) -> bool:
        """Return whether square experts are stored as (in, out): ``gate_up_proj`` has twice as many outputs."""
        parameter, _ = self._experts.get(module, ("", 0))
        gate_up = self.find_tensor(f"{parameter.rpartition('.')[0]}.gate_up_proj")
        if not parameter or gate_up is None:
            return False
        shape = self.file(gate_up).shape(gate_up)
        return len(shape) == 3 and shape[1] < shape[2]

    def _find(self, module: str) -> str | None:
        if module not in self._experts:
            return super()._find(module)
        return next(iter(self._expert_tensors(module)), None)

    def _read(self, module: str) -> tuple[str, np.ndarray]:
        if module not in self._experts or not (names := self._expert_tensors(module)):
            return super()._read(module)
        _, expert = self._experts[module]
        arrays = []
        for name in names:
            tensor = self._floats(name).unread(name)
            if len(tensor.shape) == 3:  # the tensor of all experts
                tensor = tensor[expert]
            arrays.append(tensor.read())
        return names[0], np.vstack(arrays)
