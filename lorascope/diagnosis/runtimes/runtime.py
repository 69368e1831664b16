"""Contract of a runtime, and the matching of an adapter's names and shapes with those of a base model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

from lorascope.diagnosis.case import Case
from lorascope.diagnosis.causes.config import compiled_names
from lorascope.diagnosis.causes.finding import Finding, Kind, inflect
from lorascope.files.printable import first_of, printable
from lorascope.formats.peft_config import RESIDUAL_INITS
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.formats.stored_update import AdapterFiles, uncompiled_name
from lorascope.runs.adapter import Adapter
from lorascope.schema.plugins import load_plugins

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings)$")


@dataclass(frozen=True)
class Target:
    """Target of a runtime: an adapter, and the names and shapes of the model that it is loaded into.

    Parameters
    ----------
    files : AdapterFiles
        The opened adapter.
    base : PretrainedWeights or None
        Base model; without it, only what the adapter's own files decide is known.
    """

    files: AdapterFiles
    base: PretrainedWeights | None

    @property
    def case(self) -> Case:
        """Case of the adapter, for rules that also apply to runtimes."""
        return Case(Adapter(self.files, self.base))

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of the adapter."""
        return self.files.config

    @property
    def keys(self) -> list[str]:
        """Names of all tensors of the adapter, without the segments of torch.compile, which are a separate finding."""
        return list(map(uncompiled_name, chain.from_iterable(self.files.files)))

    def keys_without(self, pattern: re.Pattern[str]) -> list[str]:
        """Return the names of the tensors in which a pattern does not occur."""
        return [key for key in self.keys if not pattern.search(key)]

    def modules_of(self, keys: Iterable[str]) -> list[str]:
        """Return the modules of the adapter that some of its keys begin with."""
        starts: set[str] = set()
        for key in keys:
            starts.update(accumulate(key.split(".")[:-1], "{}.{}".format))
        return [module for module in self.files.parts if module in starts]

    @cached_property
    def modules(self) -> dict[str, tuple[int, ...]]:
        """Modules of the base that have a weight, with its stored shape; empty without a base."""
        if self.base is None:
            return {}
        shapes = self.base.named_as(self.files.parts)
        # A parameter of another name with several dimensions contains experts.
        return {
            name.removesuffix(".weight"): shape
            for name, shape in shapes.items()
            if name.endswith(".weight") or len(shape) >= 2
        }

    def find_shape(self, module: str) -> tuple[int, ...] | None:
        """Return the stored shape of the weight that a module of the adapter has in the base, or None."""
        if module in self.modules:
            return self.modules[module]
        # Experts and attention projections have other names in the files, and copies of layers those of their source.
        renamed = module in self.files.configured or self.config.get("layer_replication")
        if renamed and self.base is not None and self.base.has_weight(module):
            return self.base.stored_shape(module)
        parent, separator, _ = f"{module}.".rpartition(".experts.")
        if separator and any(name.startswith(f"{parent}{separator}") for name in self.modules):
            return ()  # one tensor of all experts in memory, but one per expert in the files
        if self.base is not None and self.base.is_converted(module):
            return ()
        if module.endswith("lm_head"):  # a head that shares the weight of the embedding is not stored
            return self.embedding
        return None

    @property
    def embedding(self) -> tuple[int, ...] | None:
        """Stored shape of the base's embedding of tokens; None if there is not exactly one."""
        names = list(filter(_EMBEDDING.search, self.modules))
        if len(names) != 1:  # of several, the one that the head shares is not known
            return None
        return self.modules[names[0]]

    @cached_property
    def absent(self) -> list[str]:
        """Modules of the adapter that the base does not have."""
        if self.base is None:
            return []
        return [module for module in self.files.parts if self.find_shape(module) is None]

    @cached_property
    def misfits(self) -> dict[str, str]:
        """Modules whose update does not have the shape of the weight, with a text that has both shapes."""
        misfits = {}
        for module, update in self.files.parts.items():
            stored_shape = self.find_shape(module)
            if not stored_shape:
                continue
            shape = stored_shape[0], math.prod(stored_shape[1:])
            if update.shape not in (shape, shape[::-1]):
                misfits[module] = f"{module} ({join_sides(update.shape)}, in the base {join_sides(shape)})"
        return misfits

    def find_renaming(self, names: Collection[str]) -> str | None:
        """Return the change of prefix by which all these modules are in the base, if there is one."""
        for old, new in _RENAMINGS:
            if all(name.startswith(old) and new + name.removeprefix(old) in self.modules for name in names):
                return f"{old or 'no prefix'} -> {new or 'no prefix'}"
        return None


# Wrappers of a language model: with and without a head, and the two layouts of multimodal models.
_RENAMINGS = [
    ("", "model."), ("model.", ""), ("model.", "model.language_model."), ("model.", "language_model.model."),
    ("model.language_model.", "language_model.model."), ("language_model.model.", "model.language_model."),
    ("model.language_model.", "model."), ("language_model.model.", "model."),
    ("transformer.", ""), ("", "transformer."),
    ("bert.", ""), ("", "bert."), ("roberta.", ""), ("", "roberta."), ("distilbert.", ""), ("", "distilbert."),
]  # fmt: skip


@dataclass(frozen=True)
class Application:
    """Treatment of an adapter by a runtime.

    Parameters
    ----------
    runtime : str
        Name of the runtime.
    applied : int
        Number of modules that it applies.
    modules : int
        Number of modules of the adapter.
    findings : tuple of Finding
        What is dropped, refused, or applied in another way.
    """

    runtime: str
    applied: int
    modules: int
    findings: tuple[Finding, ...]


DROPPED = Kind(
    "LS201",
    "dropped",
    "caution",
    needs="config",
    problem="The runtime leaves out modules, usually without a warning.",
    evidence="names that the runtime does not find in the base, or not in its format",
    fix="rename the tensors as the finding says, or load the adapter into the model that it was trained on",
)
MISSING = Kind(
    "LS202",
    "missing",
    "caution",
    needs="base",
    problem="Targeted modules have no factors, so their base weights are used unchanged.",
    evidence="modules of the base that the configuration targets and the file does not have",
    fix="save the whole adapter, or name fewer targets",
)
REFUSED = Kind(
    "LS203",
    "refused",
    "error",
    needs="config",
    problem="The runtime raises an error, so nothing is applied.",
    evidence="an unsupported option or tensor, a rank above the limit, or a shape that does not fit the weight",
    fix="change the option that the finding names, or merge the adapter into the base",
)
ALTERED = Kind(
    "LS204",
    "applied-differently",
    "caution",
    needs="config",
    problem="The runtime applies another update than was trained.",
    evidence="an option that the runtime does not read, such as use_rslora in llama.cpp",
    fix="store the adapter without the option, as the finding says",
)
KINDS = (DROPPED, MISSING, REFUSED, ALTERED)

Check = Callable[[Target], Iterable[Finding]]
RUNTIMES: dict[str, Check] = {}
"""Checks of the runtimes by name; a finding lists the modules that are not applied."""


def runtime(name: str) -> Callable[[Check], Check]:
    """Register the check of a runtime."""

    def register(check: Check) -> Check:
        RUNTIMES[name] = check
        return check

    return register


def apply_adapter(files: AdapterFiles, base: PretrainedWeights | None, name: str) -> Application:
    """Return what a runtime does with an adapter.

    Raises
    ------
    ValueError
        The runtime is not known.
    """
    load_plugins("lorascope.diagnosis.runtimes")
    if name not in RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(sorted(RUNTIMES))}, got {printable(name)!r}")
    target = Target(files, base)
    findings = (*compiled_names.findings(target.case), *RUNTIMES[name](target))
    lost: set[str] = set()
    for finding in findings:
        lost.update(finding.modules)
        if finding.severity == "error":  # nothing is applied
            lost.update(files.parts)
    count = len(files.parts)
    return Application(name, count - len(lost & files.parts.keys()), count, findings)


def refusal(reason: str, fix: str, **evidence: Any) -> Finding:
    """Return the finding that a runtime raises an error, so nothing is applied."""
    return REFUSED.finding(reason, (), fix, **evidence)


def alteration(reason: str, fix: str, **evidence: Any) -> Finding:
    """Return the finding that a runtime applies another update than was trained."""
    return ALTERED.finding(reason, (), fix, **evidence)


def omission(modules: Collection[str], of: int, manner: str, fix: str) -> Finding:
    """Return the finding that a runtime leaves out modules; ``manner`` says what it prints."""
    verb = inflect(len(modules), "is", "are")
    reason = f"{len(modules)} of {of} modules {verb} dropped {manner}: {first_of(modules)}"
    return DROPPED.finding(reason, modules, fix, modules=len(modules), of=of)


def find_absent_modules(target: Target, manner: str) -> Iterator[Finding]:
    """Yield the modules that a runtime does not find in the base, with the renaming that would fit."""
    if target.absent:
        renaming = target.find_renaming(target.absent)
        fix = "load it into the model that it was trained on"
        if renaming:
            fix = f"rename them: {renaming}"
        yield omission(target.absent, len(target.files.parts), f"{manner}, because the base has no such module", fix)


def find_misfitting_modules(target: Target, explained: Collection[str] = ()) -> Iterator[Finding]:
    """Yield the modules whose update does not fit the weight, which every runtime refuses.

    Modules in ``explained`` are left out, because another finding is about them.
    """
    misfits = [text for module, text in target.misfits.items() if module not in explained]
    if misfits:
        count = f"{len(misfits)} of {len(target.files.parts)}"
        reason = f"the update of {count} modules does not fit the weight: {first_of(misfits)}"
        yield refusal(reason, "load it into the model that it was trained on", modules=len(misfits))


def stored_options(config: Mapping[str, Any]) -> list[str]:
    """Return the LoRA options that not every runtime supports, as the configuration contains them."""
    start = str(config.get("init_lora_weights", True)).lower()
    options = {
        "use_dora": config.get("use_dora"),
        "lora_bias": config.get("lora_bias"),
        f"bias={config.get('bias')!r}": config.get("bias") not in (None, "none"),
        f"init_lora_weights={start!r}": start.startswith(RESIDUAL_INITS),
        "alora_invocation_tokens": config.get("alora_invocation_tokens"),
        "layer_replication": config.get("layer_replication"),
        "use_bdlora": config.get("use_bdlora"),
        "use_qalora": config.get("use_qalora"),
    }
    return [name for name, value in options.items() if value]


def largest_rank(target: Target) -> int:
    """Return the largest rank of a module that a runtime has to support."""
    return max((update.rank for update in target.files.parts.values()), default=0)


def join_sides(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))
