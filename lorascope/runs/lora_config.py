"""Ranks and scales of a run as a PEFT configuration."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from statistics import mode
from typing import Any

from lorascope.schema.fused_parts import split_part_name
from lorascope.updates import LowRank, Update

_ROUTED = (
    "depends on its input, and a LoRA has no router; "
    "use ls.at_gates(run, ls.mean_gates(run, texts)) instead, an approximation with fixed gate weights"
)


def peft_keywords(run: Any, ranks: Mapping[str, int], updates: Mapping[str, Update]) -> dict[str, Any]:
    """Return a PEFT LoRA configuration, as keywords, with these ranks and the updates' scales, to load their factors.

    PEFT reads pattern keys as regular expressions that match the end of a module name. Each key is therefore written to
    match only one full name. Modules of rank 0 are not targets.
    """
    ranks, products = _configurable(run, ranks, updates)
    alphas = {}
    for name, product in products.items():
        alphas[name] = alpha_of(product.scale, ranks[name])
    return lora_keywords(ranks, alphas, _module_names(run) | updates.keys())


def next_lora_keywords(run: Any, ranks: Mapping[str, int], updates: Mapping[str, Update]) -> dict[str, Any]:
    """Return a PEFT LoRA configuration, as keywords, with these ranks and the updates' alphas, to train a new LoRA.

    A module with a smaller rank than it was trained with gets a larger scale alpha / rank; see `peft_keywords`.
    """
    ranks, products = _configurable(run, ranks, updates)
    alphas = {}
    for name, product in products.items():
        # The stored A has the rank that trained: the product of a residual also has its constant start.
        trained_rank = math.prod(product.to_factors()["A"].shape[:-1])
        alphas[name] = alpha_of(product.scale, trained_rank)
    return lora_keywords(ranks, alphas, _module_names(run) | updates.keys())


def _configurable(
    run: Any, ranks: Mapping[str, int], updates: Mapping[str, Update]
) -> tuple[dict[str, int], dict[str, LowRank]]:
    """Return ranks and products of the modules with a rank of 1 or more; raise a ValueError if there are none."""
    if run.meta.method.get("target_parameters"):
        raise ValueError(
            f"cannot configure a LoRA for {run.reference}: it adapts experts in one tensor (target_parameters)"
        )
    for name in ranks:
        if name in updates and split_part_name(name) is not None:
            fix = "export it with ls.export.to_peft, or train it with ls.LoRA(rank=run.ranks())"
            raise ValueError(f"cannot configure a LoRA for {run.reference}: PEFT adapts no part such as {name}; {fix}")
    used_ranks, used_updates = {}, {}
    for name, rank in ranks.items():
        if rank > 0 and name in updates:  # PEFT rejects rank 0
            used_ranks[name], used_updates[name] = rank, updates[name]
    if not used_ranks:
        raise no_rank_error(run)
    return used_ranks, _low_rank_products(run, used_updates)


def lora_keywords(ranks: Mapping[str, int], alphas: Mapping[str, float], modules: Collection[str]) -> dict[str, Any]:
    """Return a PEFT LoRA configuration, as keywords, with these ranks and alphas; see `peft_keywords`.

    The other ``modules`` of the model do not become targets.
    """
    # The most common values, so that the patterns have few entries.
    common_rank, common_alpha = mode(ranks.values()), mode(alphas.values())
    own_ranks, own_alphas = _uncommon(ranks, common_rank), _uncommon(alphas, common_alpha)
    if own_alphas:
        # A module with its own rank and no alpha, next to others with one, would look forgotten (LS011).
        own_alphas = {name: alpha for name, alpha in alphas.items() if name in own_ranks or name in own_alphas}
    numbers = _count_ends({*modules, *ranks})
    return {
        "r": common_rank,
        "lora_alpha": common_alpha,
        "target_modules": _target_modules(modules, ranks),
        "rank_pattern": _pattern(own_ranks, numbers),
        "alpha_pattern": _pattern(own_alphas, numbers),
    }


def _uncommon(values: Mapping[str, float], common: float) -> dict[str, float]:
    return {name: value for name, value in values.items() if value != common}


def _pattern(values: Mapping[str, float], numbers: Mapping[str, int]) -> dict[str, float]:
    """Return values of a PEFT LoRA configuration by expressions for modules; see `_common_ends` for ``numbers``."""
    names_by_value: dict[float, list[str]] = defaultdict(list)
    for name, value in values.items():
        names_by_value[value].append(name)
    pattern = {}
    for value, names in names_by_value.items():
        for name, end in _common_ends(names, numbers).items():
            # PEFT allows a prefix that ends in a dot before a key, "^" prevents it, and an unescaped dot is any letter.
            pattern[f"^{re.escape(name)}" if end is None else re.escape(end)] = value
    return pattern


def _common_ends(names: Collection[str], numbers: Mapping[str, int]) -> dict[str, str | None]:
    """Return the shortest end of each name that several modules have, all of them among the names; None without one.

    ``numbers`` counts the modules of the model by end.
    """
    counts = _count_ends(names)
    ends = {}
    for name in names:
        candidates = (end for end in _ends(name) if 1 < counts[end] == numbers[end])
        ends[name] = next(candidates, None)
    return ends


def _count_ends(names: Iterable[str]) -> Counter[str]:
    return Counter(chain.from_iterable(map(_ends, names)))


def _ends(name: str) -> Iterator[str]:
    """Yield the ends of a module's name, shortest first, up to a number: the position of a layer or expert."""
    segments = name.split(".")
    for start in range(len(segments) - 1, -1, -1):
        if segments[start].isdigit():
            return
        yield ".".join(segments[start:])


def no_rank_error(run: Any) -> ValueError:
    """Return the error for a run that has no LoRA configuration."""
    return ValueError(f"cannot configure a LoRA for {run.reference}: it has no factored update of rank >= 1")


def _low_rank_products(run: Any, updates: Mapping[str, Update]) -> dict[str, LowRank]:
    """Return the updates as products of two factors; raise a ValueError if one is not."""
    products = {}
    for name, update in updates.items():
        product = update.low_rank
        if product is None:
            raise ValueError(f"cannot convert {run.reference} to LoRA: the update of {name} is not a product B A")
        products[name] = product
    return products


def exact_products(run: Any, updates: Mapping[str, Update]) -> dict[str, LowRank]:
    """Return updates for a LoRA configuration as exact products of two factors; else raise a ValueError.

    An input-dependent update is exact only in a view of the run with fixed gate weights.
    """
    products, cannot = _low_rank_products(run, updates), f"cannot convert {run.reference} to LoRA"
    for name, update in updates.items():
        if not update.whole:
            raise ValueError(
                f"{cannot}: the factors of {name} are only the direction of its update, without its magnitude"
            )
    for name, product in products.items():
        if not (product.exact or name in run.gates):
            raise ValueError(f"{cannot}: the update of {name} {_ROUTED}")
    return products


def target_modules(run: Any, targets: Collection[str]) -> list[str] | str:
    """Return the ``target_modules`` of a PEFT LoRA configuration that match exactly these modules.

    They are ends of names that only these modules have and full names of the others, or one regular expression if the
    name of another module ends with one of them.
    """
    return _target_modules(_module_names(run), targets)


def _module_names(run: Any) -> set[str]:
    """Return the names of all modules, also the second names of tied weights."""
    return {*run.modules["module"], *",".join(run.modules["tied"]).split(",")}


def _target_modules(modules: Collection[str], targets: Collection[str]) -> list[str] | str:
    all_modules = {*modules, *targets}
    common_ends = _common_ends(targets, _count_ends(all_modules))
    entries = list(dict.fromkeys(end or name for name, end in common_ends.items()))
    ends = tuple(f".{entry}" for entry in entries)
    if any(name.endswith(ends) for name in all_modules - set(targets)):
        return "|".join(map(re.escape, targets))  # a list would match the ends of names
    return entries


def alpha_of(scale: float, rank: int) -> float:
    """Return alpha of a LoRA configuration, an integer if possible, such that alpha / rank is the scale.

    The product ``scale * rank`` may be rounded, so its neighbors are tried as well. If none gives the scale, the
    product does to the last digit of float64.
    """
    alpha = scale * rank
    neighbors = (round(alpha), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((neighbor for neighbor in neighbors if neighbor / rank == scale), alpha)
