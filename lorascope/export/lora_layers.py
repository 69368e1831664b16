"""Layers of a LoRA to write, with the dtypes that their factors are stored in.

They belong to an adapter or a sum of adapters, whole or cut to a budget. Factors that are only copied keep every
bit. If the format cannot represent the adapter, a ValueError is raised before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorascope.array_types import Float
from lorascope.export.rank_budget import select_from, truncate
from lorascope.files.printable import first_of, printable
from lorascope.files.typed_tensors import TypedTensor
from lorascope.formats.fused_rows import RowsPart
from lorascope.formats.mlx import MlxPart
from lorascope.formats.peft_config import RESIDUAL_INITS
from lorascope.formats.peft_residual import residual_kind
from lorascope.formats.peft_whole_weights import UNUSED, WholeWeight, whole_weights
from lorascope.formats.stored_update import StoredLoRA, StoredTensor, StoredUpdate, plain_name
from lorascope.runs.adapter import Adapter
from lorascope.runs.lora_config import alpha_of, exact_products, lora_keywords, no_rank_error
from lorascope.updates import Update, WeightDecomposed

ONLY_PEFT = ("layer_replication", "alora_invocation_tokens")
"""Settings of PEFT that change what the factors do, and have no counterpart in other formats."""


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """Layer of a LoRA to write: scale * B @ A of one module.

    Parameters
    ----------
    B : TypedTensor (out, rank)
    A : TypedTensor (rank, in)
        The kernel of a convolution is part of the second dimension.
    scale : float
    kernel : tuple of int
        Sides of the kernel of a convolution; () for other modules.
    embedding : bool
        Whether the module is an embedding, with ``out`` values per row of the vocabulary.
    magnitude : TypedTensor (out,), optional
        Row norms of DoRA.
    """

    B: TypedTensor
    A: TypedTensor
    scale: float
    kernel: tuple[int, ...] = ()
    embedding: bool = False
    magnitude: TypedTensor | None = None

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.A.values.shape[0]

    def kernel_factors(self) -> tuple[TypedTensor, TypedTensor]:
        """Return A (rank, in, *kernel) and B (out, rank, 1, ...); two dimensions without a kernel."""
        if not self.kernel:
            return self.A, self.B
        A = self.A.map(lambda values: values.reshape(len(values), -1, *self.kernel))
        return A, self.B.map(lambda values: values.reshape(*values.shape, *[1] * len(self.kernel)))


@dataclass(frozen=True)
class WritableLora:
    """LoRA layers of an adapter to write.

    Parameters
    ----------
    layers : mapping module -> LoraLayer
        Layers of rank 1 or more, in the order of the adapter.
    adapter : Adapter
        Adapter whose names, configuration and further weights are written.
    component : str, optional
        Component of a pipeline that all modules belong to, if their names have none.
    source : str
        What it is made from, for people.
    """

    layers: Mapping[str, LoraLayer]
    adapter: Adapter
    component: str | None = None
    source: str = ""

    @property
    def config(self) -> Mapping[str, Any]:
        """Configuration of the adapter."""
        return self.adapter.files.config

    def error(self, format: str, reason: str) -> ValueError:
        """Return the error for an adapter that a format cannot hold."""
        return ValueError(f"cannot write {self.adapter.reference} as {format}: {reason}")

    def decomposed(self, format: str) -> bool:
        """Return whether all layers are DoRA; raise a ValueError if only some are."""
        plain = [name for name, layer in self.layers.items() if layer.magnitude is None]
        if plain and len(plain) < len(self.layers):
            reason = f"{printable(plain[0])} has no magnitude, unlike other modules, and DoRA is for all"
            raise self.error(format, reason)
        return not plain

    def _is_needless(self, weight: WholeWeight) -> bool:
        """Return whether a stored weight has no effect, or equals the base."""
        # PEFT copies an adapted embedding, or a head, into the adapter even if only its factors trained.
        base, module, shape = self.adapter.base, weight.module, weight.tensor.shape
        if weight.kind != "copy" or base is None or not base.has_weight(module):
            return UNUSED.search(weight.tensor.name) is not None
        return base.shape(module) == shape and np.array_equal(base.weight(module, shape), weight.tensor.read())

    def require_only_layers(self, format: str) -> None:
        """Raise a ValueError if the adapter has more than layers of LoRA."""
        further = [weight for weight in whole_weights(self.adapter.files) if not self._is_needless(weight)]
        if further:
            names = first_of([plain_name(weight.tensor.name) for weight in further])
            fix = "; pass --base DIR to compare it with the base" if further[0].kind == "copy" else ""
            raise self.error(format, f"only PEFT folders have further weights, such as {names}{fix}")
        for setting in ONLY_PEFT:
            if self.config.get(setting):
                raise self.error(format, f"only PEFT has {setting}")


def layer_keywords(layers: Mapping[str, LoraLayer], modules: Collection[str]) -> dict[str, Any]:
    """Return PEFT's keywords for LoRA layers to write, among the modules of a model; see ``lora_keywords``."""
    ranks, alphas = {}, {}
    for name, layer in layers.items():
        ranks[name], alphas[name] = layer.rank, alpha_of(layer.scale, layer.rank)
    return lora_keywords(ranks, alphas, modules)


def writable(
    adapter: Adapter,
    budget: float | None = None,
    scores: Mapping[str, Float[np.ndarray, "_"]] | None = None,
    component: str | None = None,
) -> WritableLora:
    """Return the LoRA layers of an adapter to write, as stored or cut to a budget.

    Parameters
    ----------
    adapter : Adapter
    budget, scores
        Components to keep, see ``select_components``; all by default.
    component : str, optional
        See `WritableLora`.

    Raises
    ------
    ValueError
        An update is not a LoRA or DoRA, or has no rank, or the budget is out of range.
    """
    if adapter.input_dependent_modules():
        reason = "PEFT has no HydraLoRA; train a run and export it with ls.at_gates"
        raise ValueError(f"cannot export {adapter.reference}: {reason}")
    require_own_names(adapter)
    updates: Mapping[str, Update] = adapter.updates()
    if budget is not None:
        updates = exact_products(adapter, updates)
    return layers_of(adapter, updates, budget, scores, component)


def layers_of(
    adapter: Adapter,
    updates: Mapping[str, Update],
    budget: float | None = None,
    scores: Mapping[str, Float[np.ndarray, "_"]] | None = None,
    component: str | None = None,
    source: str = "",
) -> WritableLora:
    """Return LoRA layers with these updates, by modules of the adapter; see `writable`."""
    source = source or adapter.label
    if budget is not None:
        products, ranks = {}, {}
        for name, update in updates.items():
            product = update.low_rank
            if product is not None and product.rank:
                products[name], ranks[name] = product, product.rank
        if not ranks:
            raise no_rank_error(adapter)
        updates = truncate(products, select_from(products, ranks, budget, scores))
        source += f", cut to {sum(update.rank for update in updates.values())} components"
    layers = {name: layer for name, layer in _layers(adapter, updates) if layer.rank}
    if not layers:
        raise no_rank_error(adapter)
    return WritableLora(layers, adapter, component, source)


def _layers(adapter: Adapter, updates: Mapping[str, Update]) -> Iterator[tuple[str, LoraLayer]]:
    for module, update in updates.items():
        stored = adapter.files.parts[module]
        if isinstance(stored, RowsPart):
            stored = stored.joined  # only its dtypes and its kernel are used, which the rows share
        A, B = _factors(stored)
        product = update.direction if isinstance(update, WeightDecomposed) else update.low_rank
        if A is None or B is None or product is None:
            kind = f"the update of {printable(module)} ({adapter.files.kind}) is not stored as the factors A and B"
            raise ValueError(f"cannot export {adapter.reference} as LoRA: {kind}")
        # The update is a matrix, so the kernel of a convolution is known only from the stored A (rank, in, *kernel).
        kernel = A.file.shape(A.name)[2:] if isinstance(stored, StoredLoRA) else ()
        inner = product.A.shape[1]
        if kernel and inner % math.prod(kernel):
            raise ValueError(f"{printable(module)} must have a multiple of {math.prod(kernel)} inputs, got {inner}")
        # The reader of MLX transposes only embeddings, whose weight (rows, out) is the transpose of their update.
        embedding = ".lora_embedding_" in A.name or (isinstance(stored, MlxPart) and stored.transposed)
        layer = LoraLayer(
            TypedTensor.fitting(np.asarray(product.B), B.file.dtype(B.name)),
            TypedTensor.fitting(np.asarray(product.A), A.file.dtype(A.name)),
            product.scale,
            kernel,
            embedding,
            _magnitude(adapter, module, update),
        )
        yield module, layer


def _factors(stored: StoredUpdate) -> tuple[StoredTensor | None, StoredTensor | None]:
    """Return the tensors of A and B; None if an update is not stored as these."""
    if isinstance(stored, StoredLoRA):
        return stored.A, stored.B
    if isinstance(stored, MlxPart):
        return stored.lora_a, stored.lora_b
    return None, None


def _magnitude(adapter: Adapter, module: str, update: Update) -> TypedTensor | None:
    stored: StoredTensor | None = getattr(adapter.files.parts[module], "magnitude", None)
    if stored is None or not isinstance(update, WeightDecomposed):
        return None
    if update.magnitude.ndim == 2:
        reason = f"the magnitudes of {printable(module)} belong to the inputs, and DoRA of PEFT has one per output"
        raise ValueError(f"cannot export {adapter.reference}: {reason}")
    return TypedTensor.fitting(update.magnitude.reshape(-1), stored.file.dtype(stored.name))


def require_unchanged_base(cannot: str, config: Mapping[str, Any]) -> None:
    """Raise a ValueError that begins with ``cannot`` if PEFT changes the base to initialize a LoRA's layers."""
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(RESIDUAL_INITS):
        fix = "save it with path_initial_model_for_weight_conversion"
        raise ValueError(f"{cannot}: {printable(start)} changes the base model while PEFT loads it; {fix}")


def _require_original_base(cannot: str, adapter: Adapter) -> None:
    """Raise a ValueError if an update is relative to a base that PEFT changes while loading the adapter."""
    kind = residual_kind(adapter.files.config)
    if kind is None:
        require_unchanged_base(cannot, adapter.files.config)
        return
    if adapter.base is None:
        raise ValueError(f"{cannot}: {kind} changes the base model while PEFT loads it; pass --base DIR")
    for module, stored in adapter.files.parts.items():
        is_embedding = isinstance(stored, StoredLoRA) and ".lora_embedding_" in stored.A.name  # a plain LoRA
        start = getattr(stored, "start", None)
        if not is_embedding and (start is None or not np.isfinite(start.factors.error)):
            reason = f"the initial product of {printable(module)} does not follow from the base"
            raise ValueError(f"{cannot}: {kind} changes the base model, and {reason}")


def require_own_names(adapter: Adapter) -> None:
    """Raise a ValueError if LoRA layers do not have the model's names, or PEFT changes the base when loading them."""
    cannot, config = f"cannot export {adapter.reference}", adapter.files.config
    if config.get("target_parameters"):
        raise ValueError(f"{cannot}: it adapts experts in one tensor (target_parameters)")
    if adapter.files.configured:
        module, stored = next(iter(adapter.files.configured.items()))
        raise ValueError(f"{cannot}: {printable(module)} is tied or joined with others, as {printable(stored)}")
    _require_original_base(cannot, adapter)
    # llama.cpp also reorders the rows of query and key, so renaming modules would not be enough.
    if config.get("spelling") == "gguf":
        raise ValueError(f"{cannot}: its modules have the names of llama.cpp")
