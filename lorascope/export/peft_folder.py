"""Export of a run as a PEFT folder: its adapter, and other trained weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors.numpy import save

from lorascope.array_types import Float
from lorascope.export.exporters import find_exporter
from lorascope.export.lora_layers import require_unchanged_base
from lorascope.export.peft_lora import LoraExporter
from lorascope.export.rank_budget import select_components, truncate
from lorascope.export.writers import convert, one_of_series
from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile, write_bytes, write_json
from lorascope.formats.peft_lora import CONFIG, WEIGHTS
from lorascope.formats.stored_update import PREFIX
from lorascope.runs.adapter import Adapter
from lorascope.runs.folders import new_folder, require_absent
from lorascope.runs.lora_config import exact_products
from lorascope.runs.result import Result
from lorascope.runs.run import Run
from lorascope.runs.series import Series
from lorascope.updates import constant_factors

_HUB = {"minilm": "sentence-transformers/all-MiniLM-L6-v2", "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
_CARD = """---
base_model: {base}
library_name: peft
---

A {kind} adapter, written by lorascope from run {run} ({label}).

```python
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained({arguments})
model = PeftModel.from_pretrained(base, {folder!r})
```
"""
_HEAD_NOTE = "\nThe adapter includes the trained head; the base model must have a head of the same size, as above.\n"
_GGUF_NOTE = (
    "\nThe run was trained on a 4-bit copy of this base model, so the outputs with the original differ slightly.\n"
)
_GATES_NOTE = (
    "\nThis is HydraLoRA at {gates}, without its routers: its outputs approximate those of the trained model.\n"
)


def to_peft(
    run: Result,
    out: str | Path,
    state: str = "last",
    budget: float | None = None,
    scores: Mapping[str, Float[np.ndarray, "_"]] | None = None,
) -> Path:
    """Write an adapter and other trained weights as a folder for ``PeftModel.from_pretrained``.

    Parameters
    ----------
    run : Run
        Run with updates that are products of two factors, exported as LoRA, or a run of FourierFT, DoRA or VeRA. A
        HydraLoRA run from ``at_gates`` is also exported as LoRA: exact at these gate weights, and an approximation of
        HydraLoRA.
    out : path
        New folder.
    state : {"last", "best"}
        Saved state to export, "last" by default.
    budget : float or int, optional
        Components to keep, as in ``select_components``: each update is replaced by its best approximation of the rank
        that it keeps, as LoRA. Default all, which is exact.
    scores : mapping module -> array, optional
        See ``select_components``.

    Returns
    -------
    path
        The folder; its README.md shows how to load it.

    Raises
    ------
    FileExistsError
        The folder exists.
    ValueError
        PEFT cannot express the updates, or none has a rank.
    """
    path = Path(out)
    require_absent(path)
    if isinstance(run, Adapter):
        return convert(run, path, "peft", budget, scores)
    if isinstance(run, Series):
        raise one_of_series(run)
    if run.meta.method["name"] == "peft":
        require_unchanged_base(f"cannot export run {run.id} ({run.label})", run.meta.method)
        refuse_unkept(run, state)
    exporter = find_exporter(run, state)
    updates, weights = exporter.updates(run, state), _other_weights(run, state)
    if budget is not None:
        exporter, chosen = LoraExporter(), select_components(run, budget, state, scores)
        updates = dict(truncate(exact_products(run, updates), chosen))
    if run.meta.hosts is None:
        raise ValueError(
            f"cannot export run {run.id}: it did not record its adapted layers (old version); train it again"
        )
    hosts = run.meta.hosts
    rolled = next((name for name in updates if hosts[name] in ("Conv1d", "Conv2d", "Conv3d")), None)
    if rolled is not None:
        reason = f"the kernel shape of {rolled} ({hosts[rolled]}) was not recorded; use the folder that PEFT saved"
        raise ValueError(f"cannot export run {run.id} ({run.label}): {reason}")
    merged = [name for name in updates if f"{name}.weight" in weights]  # PEFT saves an adapter or a whole weight
    if merged and len(merged) == len(updates):
        raise ValueError(f"cannot export run {run.id}: no adapter is left, because all adapted weights also trained")
    for name in merged:
        W, turned = weights[f"{name}.weight"], hosts[name] != "Linear"
        whole = exporter.merge(updates.pop(name), W.T if turned else W)
        weights[f"{name}.weight"] = whole.T if turned else whole
    biased = next((name for name in updates if f"{name}.bias" in weights), None)
    if biased is not None:
        reason = f"the trained bias of adapted module {biased} is not supported; use the folder that PEFT saved"
        raise ValueError(f"cannot export run {run.id} ({run.label}): {reason}")
    saved = _owners(run, weights)
    config = {
        "task_type": _peft_task_type(run, saved),
        "base_model_name_or_path": _base(run)[0],
        "inference_mode": True,
        **exporter.keywords(run, updates),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(hosts[name] == "Conv1D" for name in updates),
        "bias": "none",
    }
    own = dict(pair for name, update in updates.items() for pair in exporter.tensors(name, update, hosts[name]))
    stored = {PREFIX + name: array for name, array in (own | weights).items()} | exporter.shared_tensors(updates)
    with new_folder(path) as draft:
        arrays = {name: np.ascontiguousarray(array) for name, array in stored.items()}
        write_bytes(draft / WEIGHTS, save(arrays, metadata={"format": "pt"}))
        write_json(draft / CONFIG, config)
        write_bytes(draft / "README.md", _card(run, config, exporter.kind, path.name).encode())
    return path


def refuse_unkept(run: Result, state: str) -> None:
    """Raise a ValueError if PEFT trained more parameters than the recording of its training stored.

    A recording stores the factors and the trained parameters of the base model.
    """
    factors = list(run.factors(state=state).values())
    kept = sum(array.size for each in factors for name, array in each.items() if name not in constant_factors())
    if run.meta.method.get("kind") == "ADALORA":  # its diagonals are stored as part of A
        kept += sum(len(each["A"]) for each in factors if "A" in each)
    saved = TensorFile(cast(Run, run).state_file(state))
    kept += sum(math.prod(saved.shape(name)) for name in saved)
    # The difference is negative if a factor was frozen.
    if (missing := run.meta.parameters.trained - kept) > 0:
        raise ValueError(
            f"cannot restore the adapter of run {run.id} ({run.label}): {missing:,} trained parameters, such as biases "
            "of the factors, were not recorded; use the folder that PEFT saved"
        )


def _other_weights(run: Result, state: str) -> dict[str, np.ndarray]:
    """Return the weights that trained in addition to the adapters, by parameter name."""
    file = TensorFile(cast(Run, run).state_file(state))
    adapted = run.ranks(state)
    # Names with a slash are method state; a name without a dot is a buffer of the model itself, which PEFT cannot save.
    others = (name for name in file if "." in name and "/" not in name)
    return {name: file[name] for name in others if name.partition(".delta.")[0] not in adapted}


def _owners(run: Result, weights: Mapping[str, np.ndarray]) -> list[str]:
    """Return ``modules_to_save``; for a head of several layers, it is their parent, as in PEFT."""
    roots = _head_roots(run)
    owners = [name.rpartition(".")[0] for name in weights]
    found = (next((root for root in roots if f"{owner}.".startswith(f"{root}.")), owner) for owner in owners)
    return list(dict.fromkeys(found))


def _head_roots(run: Result) -> list[str]:
    """Return the parent of every layer of the classifier head, or the layer itself without one."""
    if run.meta.labels is None:
        return []
    heads = run.modules.loc[run.modules["role"] == "head", "module"]
    return [head.rpartition(".")[0] or head for head in heads]


def _peft_task_type(run: Result, saved: list[str]) -> str | None:
    if run.meta.task_kind == "image":
        return None  # PEFT has no task type for images
    recorded = run.meta.task_type
    if recorded is not None and recorded not in _AUTO:
        raise ValueError(
            f"cannot export run {run.id} ({run.label}): task_type must be one of {', '.join(_AUTO)}, got {recorded}; "
            "use the folder that PEFT saved"
        )
    if recorded not in (None, "SEQ_CLS"):
        return recorded
    if run.meta.labels is not None:  # PEFT always saves the head with SEQ_CLS, so it must have been trained
        return "SEQ_CLS" if set(_head_roots(run)) & set(saved) else None
    return "SEQ_2_SEQ_LM" if {"encoder", "decoder"} <= set(run.modules["stack"]) else "CAUSAL_LM"


def base_of(run: Result) -> tuple[str, int | None]:
    """Return the name that loads a run's base model, and its number of blocks if it was shortened, else None."""
    name, blocks = re.fullmatch(r"(?s)(.*?)(?:, first (\d+) blocks)?", run.meta.model).groups()  # type: ignore[union-attr]
    return name, int(blocks) if blocks else None


def _base(run: Result) -> tuple[str, int | None]:
    """Return the same as `base_of`, with the name on the Hugging Face Hub for models that lorascope includes."""
    name, blocks = base_of(run)
    return _HUB.get(name, name), blocks


def _card(run: Result, config: Mapping[str, Any], kind: str, folder: str) -> str:
    """Return the README of the folder, which shows how to load the adapter."""
    labels, image = run.meta.labels, run.meta.task_kind == "image"
    base, blocks = _base(run)
    options = [f"num_hidden_layers={blocks}"] if blocks else []
    if labels is not None:
        options += [f"num_labels={len(labels)}", f"id2label={dict(enumerate(labels))}"]
    text = _CARD.format(
        base=base if re.fullmatch(r"[\w./-]+", base) else json.dumps(base),
        kind=kind,
        run=run.id,
        label=re.sub(r"([\\`*_\[\]<&])", r"\\\1", printable(run.label)),
        auto="AutoModelForImageClassification" if image else _AUTO[config["task_type"] or "SEQ_CLS"],
        arguments=", ".join([repr(base), *options]),
        folder=folder,
    )
    head = config["task_type"] == "SEQ_CLS" or (image and bool(config["modules_to_save"]))
    notes = head * _HEAD_NOTE + (base == _HUB["smollm2"]) * _GGUF_NOTE
    return text + notes + (_GATES_NOTE.format(gates=run.gates_label) if run.gates else "")
