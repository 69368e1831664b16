"""Updates of one module in the algorithms of LyCORIS: LoRA, LoHa, LoKr, full differences, IA3, GLoRA, OFT and BOFT.

Convolutions are matrices (out, in * kernel). With ``dora_scale``, the norms of the rows or columns of the new weight
are learned, too: the update then requires the base, and without it only that of the direction is known. IA3, GLoRA, OFT
and BOFT always require it.

Source: LyCORIS (arXiv 2309.14859) and lycoris-lora 4.1.3; kohya's ``networks.lora`` and ``networks.oft`` are the same.
A zero alpha counts as the rank, and a LoKr of two full matrices has the scale 1 regardless of alpha, as there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from lorascope.array_types import Float
from lorascope.files.printable import printable
from lorascope.files.typed_json import unreadable
from lorascope.formats.adapter_faults import AdapterFault, FaultKind
from lorascope.formats.image_keys import Tensors
from lorascope.formats.peft_dora import DoraPart
from lorascope.formats.peft_factors import StoredFactors, check_fit, check_shapes, stored_shape
from lorascope.formats.peft_loha import hadamard_part, hadamard_shapes
from lorascope.formats.peft_lokr import kronecker_part, kronecker_shapes
from lorascope.formats.pretrained_weights import OptionalBase
from lorascope.formats.stored_update import StoredLoRA, StoredUpdate
from lorascope.updates import Dense, LowRank, Update, WeightDecomposed
from lorascope.updates.linalg import as_float64
from lorascope.updates.weight_decomposed import set_magnitude

Arrays = dict[str, np.ndarray]
Scale = Callable[[int], float]


@dataclass(frozen=True)
class LycorisModule:
    """Tensors of one module for an algorithm of LyCORIS.

    Parameters
    ----------
    path : path
        The adapter, for error messages.
    name : str
    tensors : mapping factor -> StoredTensor
    scales : callable
        Scale of a rank.
    base : PretrainedWeights, optional
        Base, if it has the module.
    """

    path: Path
    name: str
    tensors: Tensors
    scales: Scale
    base: OptionalBase

    def check(self, shapes: dict[str, str], **sizes: int) -> dict[str, int]:
        """Check the shapes of tensors; see `check_shapes`."""
        return check_shapes(self.path, self.name, self.tensors, shapes, **sizes)

    def scale_of(self, rank: int) -> float:
        """Return the scale of a rank, which must be 1 or more."""
        if rank < 1:
            raise self.error(f"must have a rank >= 1, got {rank}")
        return self.scales(rank)

    def require_no_kernel(self, *names: str) -> None:
        """Raise a ValueError if one of these tensors has a kernel larger than 1."""
        for name in names:
            shape = stored_shape(self.tensors[name])
            if self.tensors[name].shape != shape[:2]:
                raise self.error(f"must have {name} with a kernel of 1, got shape {shape}")

    def pick(self, *names: str) -> Tensors:
        """Return those of the named tensors that the module has."""
        return {name: self.tensors[name] for name in names if name in self.tensors}

    def weight(self) -> np.ndarray:
        """Load the weight of the base, (out, in)."""
        assert self.base is not None
        return as_float64(self.base.weight(self.name, self.base.shape(self.name)))

    def base_shape(self, kind: str) -> tuple[int, int]:
        """Return the shape of the base's weight; without a base, raise a ValueError."""
        if self.base is None:
            reason = f"{kind} changes the weights of its base: pass a base with {printable(self.name)}, --base DIR"
            raise unreadable(self.path, reason)
        return self.base.shape(self.name)

    def error(self, reason: str, kind: FaultKind = "shape") -> AdapterFault:
        """Return the error for a module whose tensors have a fault."""
        return AdapterFault(kind, self.path, f"{printable(self.name)} {reason}")


def read_module(module: LycorisModule) -> tuple[str, StoredUpdate]:
    """Return the name of a module's algorithm in LyCORIS, and its stored update.

    Raises
    ------
    ValueError
        A tensor is missing or has the wrong shape, or the update requires a base that is not given.
    """
    kinds = [kind for kind, (names, _) in _ALGORITHMS.items() if module.tensors.keys() & set(names.split())]
    if len(kinds) != 1:
        names = " and ".join(module.tensors)
        raise module.error(f"has {names}, the parts of {' and '.join(kinds) or 'no algorithm'}")
    kind = kinds[0]
    stored = _ALGORITHMS[kind][1](module)
    if module.base is not None:
        check_fit(module.path, module.name, stored.shape, module.base.shape(module.name))
    return kind, _with_magnitude(module, stored)


def _lora(module: LycorisModule) -> StoredUpdate:
    for factor, spelling in {"A": "lora_down (lora_A)", "B": "lora_up (lora_B)"}.items():
        if factor not in module.tensors:
            raise module.error(f"has no {spelling}", "incomplete")
    A, B = module.tensors["A"], module.tensors["B"]
    if "mid" in module.tensors:
        sizes = module.check({"B": "out rank *", "mid": "rank inner *", "A": "inner in *"})
        module.require_no_kernel("A", "B")
        kernel = stored_shape(module.tensors["mid"])[2:]
        sides = sizes["out"], sizes["in"] * int(np.prod(kernel))
        scale = module.scale_of(sizes["inner"])
        return StoredFactors(module.pick("B", "A", "mid"), sides, sizes["rank"], partial(_tucker, scale), scale)
    if A.shape[0] != B.shape[1]:
        raise module.error(f"must have factors of one rank, got {A.shape[0]} and {B.shape[1]}")
    return StoredLoRA(B, A, module.scale_of(A.shape[0]), False)


def _tucker(scale: float, arrays: Arrays) -> Update:
    """Return the product of up (out, rank) and the core (rank, inner, kernel) times down (inner, in)."""
    core, up, down = as_float64(arrays["mid"]), flat(arrays["B"]), flat(arrays["A"])
    A = np.einsum("mn...,nj->mj...", core, down).reshape(len(core), -1)  # sum_n mid[m, n, ...] down[n, j]
    return LowRank(up, A, scale)


def flat(array: np.ndarray) -> Float[np.ndarray, "rows columns"]:
    """Return a LyCORIS tensor in float64 as a matrix; the kernel of a convolution is part of the columns."""
    return as_float64(array).reshape(len(array), -1)


def _loha(module: LycorisModule) -> StoredUpdate:
    shapes = hadamard_shapes(module.tensors)
    sizes = module.check(shapes)
    return hadamard_part(module.pick(*shapes), sizes, module.scale_of(sizes["r"]))


def _lokr(module: LycorisModule) -> StoredUpdate:
    shapes = kronecker_shapes(module.tensors)
    sizes = module.check(shapes)
    scale = 1.0  # two full matrices have no rank, and LyCORIS ignores their alpha
    if "r" in sizes:
        scale = module.scale_of(sizes["r"])
    return kronecker_part(module.pick(*shapes), sizes, scale)


def _full(module: LycorisModule) -> StoredUpdate:
    tensors = module.pick("diff", "w_norm", "set_weight")
    tensor = next(iter(tensors.values()))
    return StoredFactors(tensors, tensor.shape, min(tensor.shape), partial(_difference, module), thin=False)


def _difference(module: LycorisModule, arrays: Arrays) -> Update:
    if "set_weight" in arrays:
        return Dense(flat(arrays["set_weight"]) - module.weight())
    matrix = next(iter(arrays.values()))
    return Dense(matrix.reshape(len(matrix), -1))


def _ia3(module: LycorisModule) -> StoredUpdate:
    sides = module.base_shape("IA3")
    if module.tensors["on_input"].shape != (1, 1):
        raise module.error(f"must have one value on_input, got shape {stored_shape(module.tensors['on_input'])}")
    on_input = bool(module.tensors["on_input"].read()[0, 0])
    if "weight" not in module.tensors:
        raise module.error("has on_input but no weight", "incomplete")
    count = int(np.prod(stored_shape(module.tensors["weight"])))
    if not count or sides[on_input] % count or (count != sides[0] and not on_input):
        raise module.error(f"must have a weight for each of {sides[on_input]} {'inputs' if on_input else 'outputs'}")
    build = partial(_rescaled, module, on_input)
    return StoredFactors(module.pick("weight"), sides, min(sides), build, thin=False)


def _rescaled(module: LycorisModule, on_input: bool, arrays: Arrays) -> Update:
    W, factor = module.weight(), as_float64(arrays["weight"]).reshape(-1)
    if not on_input:
        return Dense(W * factor[:, None])
    # The inputs of a convolution have one column for each value of the kernel.
    return Dense(W * np.repeat(factor, W.shape[1] // factor.size))


def _glora(module: LycorisModule) -> StoredUpdate:
    if "bm" in module.tensors:
        reason = f"{printable(module.name)} has bm, and GLoRA with a Tucker core is not supported"
        raise unreadable(module.path, reason)
    sides = module.base_shape("GLoRA")
    sizes = module.check({"a1": "in rank *", "a2": "rank in *", "b1": "out rank *", "b2": "rank in *"}, out=sides[0])
    module.require_no_kernel("a1", "a2", "b1")
    kernel = sides[1] // sizes["in"]
    if module.tensors["b2"].shape[1] != sides[1] or kernel * sizes["in"] != sides[1]:
        raise module.error(f"must have b2 with {sides[1]} columns, got {module.tensors['b2'].shape[1]}")
    scale, rank = module.scale_of(sizes["rank"]), min(2 * sizes["rank"], *sides)
    # W (I + a1 a2) has low-rank factors unless the kernel of a convolution is between W and a1.
    thin = kernel == 1 and rank < min(sides)
    if not thin:
        rank = min(sides)
    build = partial(_added_and_multiplied, module, scale, thin)
    return StoredFactors(module.pick("a1", "a2", "b1", "b2"), sides, rank, build, scale, thin=thin)


def _added_and_multiplied(module: LycorisModule, scale: float, thin: bool, arrays: Arrays) -> Update:
    a1, a2, b1, b2 = (flat(arrays[name]) for name in ("a1", "a2", "b1", "b2"))
    W = module.weight()
    if thin:
        return LowRank(np.hstack([b1, W @ a1]), np.vstack([b2, a2]), scale)
    channels = np.einsum("oik,ir,rj->ojk", W.reshape(len(W), len(a1), -1), a1, a2, optimize=True)
    return Dense(scale * (b1 @ b2 + channels.reshape(W.shape)))


def _oft(module: LycorisModule) -> StoredUpdate:
    blocks = module.tensors["oft_blocks"]
    shape = stored_shape(blocks)
    # LyCORIS stores BOFT under the same name, with a first axis for its steps.
    kind = "BOFT" if len(shape) == 4 else "OFT"
    sides = module.base_shape(kind)
    outer = sides[0]
    if len(shape) not in (3, 4) or shape[-1] != shape[-2] or shape[-3] * shape[-1] != outer:
        raise module.error(f"must have square oft_blocks for {outer} rows in total, got shape {shape}")
    if kind == "BOFT":
        for step in range(shape[0]):  # each one mixes rows that are twice as far apart
            if outer % (2**step * shape[-1]) or shape[-1] % 2:
                raise module.error(f"must have <= log2 of {outer} / {shape[-1]} steps, got {shape[0]}")
    if "rescale" in module.tensors and module.tensors["rescale"].shape != (outer, 1):
        raise module.error(f"must have {outer} values in rescale, got shape {stored_shape(module.tensors['rescale'])}")
    tensors = module.pick("oft_blocks", "rescale", "alpha")
    return StoredFactors(tensors, sides, min(sides), partial(_rotated, module), thin=False)


def _rotated(module: LycorisModule, arrays: Arrays) -> Update:
    blocks, W = as_float64(arrays["oft_blocks"]), module.weight()
    skew = blocks - blocks.swapaxes(-1, -2)
    if "alpha" in arrays:
        # LyCORIS multiplies the bound by the number of outputs, unlike ComfyUI.
        limit, norm = float(arrays["alpha"].reshape(-1)[0]) * len(W), np.linalg.norm(skew)
        if 0 < limit < norm:
            skew *= limit / norm
    unit = np.eye(skew.shape[-1])
    R = (unit + skew) @ np.linalg.inv(unit - skew)
    rotated = W
    # OFT multiplies rows by the transposed rotations, and BOFT by the rotations themselves.
    if R.ndim == 3:
        rotated = np.einsum("knm,knj->kmj", R, W.reshape(*R.shape[:2], -1)).reshape(W.shape)
    else:
        for step, factors in enumerate(R):
            rotated = _butterfly(rotated, factors, 2**step * len(unit) // 2)
    if "rescale" in arrays:
        rotated = as_float64(arrays["rescale"]).reshape(-1, 1) * rotated
    return Dense(rotated - W)


def _butterfly(W: np.ndarray, blocks: np.ndarray, stride: int) -> np.ndarray:
    """Multiply groups of rows by blocks (count, b, b), after an interleaving with this stride that is then undone."""
    mixed = W.reshape(-1, 2, stride, W.shape[1]).swapaxes(1, 2).reshape(*blocks.shape[:2], -1)
    return (blocks @ mixed).reshape(-1, stride, 2, W.shape[1]).swapaxes(1, 2).reshape(W.shape)


_ALGORITHMS: dict[str, tuple[str, Callable[[LycorisModule], StoredUpdate]]] = {
    "LoRA": ("A B mid", _lora),
    "LoHa": ("hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2", _loha),
    "LoKr": ("lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2", _lokr),
    "Full": ("diff w_norm set_weight", _full),
    "IA3": ("on_input", _ia3),
    "GLoRA": ("a1 a2 b1 b2 bm", _glora),
    "OFT": ("oft_blocks", _oft),
}
"""Tensors and reader of every algorithm."""


def _with_magnitude(module: LycorisModule, stored: StoredUpdate) -> StoredUpdate:
    """Return the stored update with the learned norms of rows or columns, if the module has them."""
    magnitude = next(iter(module.pick("magnitude", "dora_scale").values()), None)
    if magnitude is None:
        return stored
    (outer, inner), shape = stored.shape, stored_shape(magnitude)
    count = int(np.prod(shape))
    # A square weight has as many rows as columns, so the axis of the values decides.
    by_row = count == outer and (not shape or shape[0] == outer or "magnitude" in module.tensors)
    by_column = not by_row and len(shape) > 1 and shape[0] == 1 and count > 0 and inner % count == 0
    if not (by_row or by_column):
        raise module.error(f"must have {outer} magnitudes (outputs), or one per input, got shape {shape}")
    if by_row and type(stored) is StoredLoRA:
        return DoraPart(**vars(stored), magnitude=magnitude, module=module.name, base=module.base)
    if isinstance(stored, StoredLoRA):
        tensors, rank, thin = {"B": stored.B, "A": stored.A}, stored.rank, True
        build: Callable[[Arrays], Update] = partial(_product, stored.scale)
    else:
        assert isinstance(stored, StoredFactors)
        tensors, rank, thin, build = dict(stored.tensors), stored.rank, stored.thin, stored.build
    tensors["magnitude"], thin = magnitude, thin and module.base is None
    return StoredFactors(
        tensors, stored.shape, rank, partial(_decomposed, module, build, by_row), stored.scale, thin=thin
    )


def _product(scale: float, arrays: Arrays) -> Update:
    A, B = arrays["A"], arrays["B"]
    return LowRank(B.reshape(len(B), -1), A.reshape(len(A), -1), scale)


def _decomposed(module: LycorisModule, build: Callable[[Arrays], Update], by_row: bool, arrays: Arrays) -> Update:
    direction = build(arrays)
    magnitude = arrays["magnitude"].reshape(-1 if by_row else (1, -1))
    W0 = None if module.base is None else module.weight()
    if isinstance(direction, LowRank):
        return WeightDecomposed(direction.B, direction.A, magnitude, direction.scale, W0)
    if W0 is None:
        return direction
    return Dense(set_magnitude(direction.dense() + W0, magnitude) - W0)
