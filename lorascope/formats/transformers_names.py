"""Names that transformers gives to the tensors of a checkpoint while loading it, such as those of ViT and LLaVA.

An adapter has the names of the module tree, and a checkpoint may have older ones: ``vit.layers.0.attention.q_proj`` is
``vit.encoder.layer.0.attention.attention.query`` in the file. transformers has a list of renamings by class or type of
model. Those of a model inside another apply to the part of the names that is its own, so the table also has the models
that each architecture consists of.

Source: transformers 5.24, ``conversion_mapping`` and ``core_model_loading``.
"""

from __future__ import annotations

import importlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).with_suffix(".json")
"""Renamings of one version of transformers, and the models of its architectures, for machines without transformers."""


class Tree(NamedTuple):
    """Names in the module tree.

    Parameters
    ----------
    names : mapping stored name -> sequence of str
        Names of the tensors of a checkpoint; several are equal blocks of rows.
    converted : frozenset of str
        Names of tensors that transformers computes from those of the checkpoint in another way.
    """

    names: Mapping[str, Sequence[str]]
    converted: frozenset[str]


class _Renaming(NamedTuple):
    """Renaming of tensors: a pattern with one named group per alternative, new names, and what else happens to them."""

    pattern: re.Pattern[str]
    targets: Sequence[str]
    operation: str
    starts: Sequence[str]

    def rename(self, name: str) -> list[str]:
        """Return the new names of a tensor; none if the renaming does not concern it."""
        match = self.match(name)
        if match is None:
            return []
        start, own_name = name[: len(name) - len(match.string)], match.string
        alternative = _alternative(match)
        # The alternatives of a group have one new name each.
        targets = [self.targets[alternative]] if self.operation == "group" else self.targets
        new_names = []
        for target in targets:
            if r"\1" in target:
                inner = self.pattern.groupindex[f"g{alternative}"] + 1
                target = target.replace(r"\1", match[inner])
            new_names.append(start + own_name.replace(match[0], target, 1))
        return new_names

    def match(self, name: str) -> re.Match[str] | None:
        """Return the match in the part of a tensor's name that belongs to the model of the renaming."""
        for start in self.starts:
            if name.startswith(start):
                return self.pattern.search(name.removeprefix(start))
        return None

    def concerns(self, names: Iterable[str]) -> bool:
        """Return whether it renames a checkpoint: a group does if there is a name of its first alternative.

        The new name of one is the old name of the next, so names that were renamed before would be renamed again.
        """
        if self.operation != "group":
            return True
        return any(match is not None and _alternative(match) == 0 for match in map(self.match, names))


def _alternative(match: re.Match[str]) -> int:
    """Return the number of the alternative that matched, whose groups are named g0, g1 and so on."""
    return next(int(group[1:]) for group, text in match.groupdict().items() if text is not None)


def tree(config: Mapping[str, Any], names: Iterable[str]) -> Tree:
    """Return the names that tensors of a checkpoint have in the module tree.

    Parameters
    ----------
    config : mapping
        Content of the checkpoint's config.json.
    names : iterable of str
        Names of its tensors.
    """
    renamings = list(_renamings(config))
    new_names = {name: name for name in names}
    for renaming in renamings:
        if renaming.operation in ("rename", "group") and renaming.concerns(new_names.values()):
            for name, new_name in new_names.items():
                new_names[name] = next(iter(renaming.rename(new_name)), new_name)
    tree_names: dict[str, Sequence[str]] = {}
    converted: set[str] = set()
    for name, new_name in new_names.items():
        tree_names[name] = [new_name]
        # transformers applies one conversion, to the renamed tensor.
        for renaming in renamings:
            if renaming.operation in ("rename", "group") or not (targets := renaming.rename(new_name)):
                continue
            if renaming.operation == "chunk":
                tree_names[name] = targets
            else:
                converted.update(targets)
            break
    return Tree(tree_names, frozenset(converted))


def _renamings(config: Mapping[str, Any]) -> Iterator[_Renaming]:
    """Yield the renamings of a model in the order in which transformers applies them.

    As there, a model inside another of its class or type adds none.
    """
    table = _table()
    prefix, models = _models(config)
    paths_by_owner: dict[str, list[str]] = defaultdict(list)
    for path, class_name, model_type, section in models:
        kind = _kind(config, section, model_type)
        if kind != model_type:
            class_name = table["classes"].get(kind, kind)
        owner = class_name if renamings_of(class_name) else kind
        owners = {class_name, owner}
        if any(_is_inside(path, outer) for name in owners for outer in paths_by_owner[name]):
            continue
        entries = renamings_of(owner)
        if not entries:
            continue
        for pattern, targets, operation in entries:
            yield _Renaming(re.compile(pattern), targets, operation, _starts(path, prefix))
        for name in owners:
            paths_by_owner[name].append(path)
    for pattern, targets, operation in renamings_of("legacy"):
        yield _Renaming(re.compile(pattern), targets, operation, [""])


def _models(config: Mapping[str, Any]) -> tuple[str, Sequence[Sequence[Any]]]:
    """Return the prefix of the base model and the models that an architecture consists of."""
    architectures = _table()["architectures"]
    names: Any = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    model_type = str(config.get("model_type"))
    if name in architectures:
        return architectures[name]["prefix"], architectures[name]["models"]
    # Another head on the same model, or a model that cannot be built from its default configuration.
    for sibling in architectures.values():
        (path, _, kind, section), *submodels = sibling["models"]
        if kind == model_type:
            return sibling["prefix"], [[path, name, kind, section], *submodels]
    return "", [["", name, model_type, None]]


def _kind(config: Mapping[str, Any], section: str | None, default: str) -> str:
    """Return the type of a model that a section of the configuration describes."""
    described: Any = config.get(section) if section else None
    if not isinstance(described, Mapping):
        return default
    return str(described.get("model_type", default))


def _is_inside(path: str, outer: str) -> bool:
    return outer == "" or path.startswith(f"{outer}.")


def _starts(path: str, prefix: str) -> list[str]:
    """Return the starts of the names that a model owns, which may lack the prefix of the base model."""
    if not path:
        return [""]
    scope = path.removeprefix(prefix).removeprefix(".")
    inner = f"{scope}." if scope else ""
    outer = f"{prefix}." if prefix else ""
    return [outer + inner, inner]


def renamings_of(owner: str) -> Sequence[Sequence[Any]]:
    """Return pattern, new names and operation of the renamings of a class or type of model; see `operation`."""
    table = _table()
    if _installed_version() in (None, table["transformers"]):
        return table["renamings"].get(owner, ())
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
    except ImportError:  # before version 5, transformers had the renamings in its models
        return table["renamings"].get(owner, ())
    return describe_transforms(mapping.get_checkpoint_conversion_mapping(owner) or ())


def describe_transforms(transforms: Iterable[Any]) -> list[list[Any]]:
    """Return pattern, new names and operation of transforms of transformers."""
    return [[transform.compiled_sources.pattern, list(transform.target_patterns), operation(transform)]
            for transform in transforms]  # fmt: skip


def operation(transform: Any) -> str:
    """Return the effect of a transform: "rename", "group" of renamings, "chunk" of rows, or another "conversion"."""
    loading = importlib.import_module("transformers.core_model_loading")
    if isinstance(transform, loading.WeightConverter):
        is_chunk = [isinstance(step, loading.Chunk) and step.dim == 0 for step in transform.operations]
        return "chunk" if is_chunk == [True] else "conversion"
    if isinstance(transform, loading.GroupWeightRename):
        return "group"
    # Subclasses with their own method rename by more than a pattern, such as an offset of the layer.
    is_plain = type(transform).rename_source_key is loading.WeightRenaming.rename_source_key
    return "rename" if is_plain else "conversion"


@cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


@cache
def _installed_version() -> str | None:
    from importlib import metadata  # slow, and only a base with a configuration needs it

    try:
        return metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return None
