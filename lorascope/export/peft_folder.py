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
from lorascope.export.conversion import convert, series_error, write_lora
from lorascope.export.exporters import RunExporter, find_exporter
from lorascope.export.joined_parts import join_hosts, join_weight_parts
from lorascope.export.lora_layers import layers_of, require_unchanged_base
from lorascope.export.peft_lora import LoraExporter
from lorascope.export.rank_budget import select_components, truncate
from lorascope.export.scaled_parts import scale_products
from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile
from lorascope.files.whole_files import require_absent, write_bytes, write_json
from lorascope.formats.peft_config import CONFIG, WEIGHTS
from lorascope.formats.stored_update import PREFIX
from lorascope.runs.adapter import Adapter
from lorascope.runs.folders import new_folder
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
# Without a task type in PEFT: it has none for images, and with QUESTION_ANS its models ignore token_type_ids.
_UNTYPED = {"image": "AutoModelForImageClassification", "span": "AutoModelForQuestionAnswering"}
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
    scales: Mapping[str, float] | None = None,
) -> Path:
    """Write a run's adapter and other trained weights as a folder for ``PeftModel.from_pretrained``.

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
    scales : mapping part -> scale, optional
        Scales of parts of the update, such as ``dial.best()``: ``"whole"``, modules, roles, layers or components, as
        LoRA. Not with a budget.

    Returns
    -------
    path
        The folder; its README.md shows how to load it.

    Raises
    ------
    FileExistsError
        The folder exists.
    ValueError
        PEFT cannot express the updates, none has a rank, or a part to scale is unknown.
    """
    path = Path(out)
    require_absent(path)
    if scales is not None and budget is not None:
        raise ValueError("scales cannot be combined with a budget: the parts of a dial are those of the whole update")
    if isinstance(run, Adapter) and scales is not None:
        products = scale_products(run, exact_products(run, run.updates()), scales)
        return write_lora(layers_of(run, products, source=f"{run.label}, scaled"), path, "peft")
    if isinstance(run, Adapter):
        return convert(run, path, "peft", budget, scores)
    if isinstance(run, Series):
        raise series_error(run)
    if run.meta.method["name"] == "peft":
        require_unchanged_base(f"cannot export {run.reference}", run.meta.method)
        require_all_recorded(run, state)
    exporter: RunExporter = find_exporter(run, state)
    updates, weights = exporter.updates(run, state), _other_weights(run, state)
    if budget is not None:  # truncated updates are products B A, for any kind of run
        exporter = LoraExporter()
        updates = dict(truncate(exact_products(run, updates), select_components(run, budget, state, scores)))
    elif scales is not None:
        exporter = LoraExporter()
        updates = scale_products(run, exact_products(run, updates), scales)
    if run.meta.weight_parts is not None:
        updates = join_weight_parts(run, updates, exporter.kind)
    hosts = _hosts(run, updates)
    _merge_trained_weights(run, exporter, updates, weights, hosts)
    tensors = dict(weights)
    for name, update in updates.items():
        tensors |= exporter.tensors(name, update, hosts[name])
    modules_to_save = _owners(run, weights)
    config = {
        "task_type": _peft_task_type(run, modules_to_save),
        "base_model_name_or_path": _base(run)[0],
        "inference_mode": True,
        **exporter.keywords(run, updates),
        "modules_to_save": modules_to_save or None,
        "fan_in_fan_out": "Conv1D" in map(hosts.get, updates),
        "bias": "none",
    }
    arrays = exporter.shared_tensors(updates)
    for name, array in tensors.items():
        arrays[PREFIX + name] = array
    # safetensors requires contiguous arrays.
    content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, {"format": "pt"})
    write_peft_folder(path, content, config, _card(run, config, exporter.kind, path.name))
    return path


def write_peft_folder(path: Path, weights: bytes, config: Mapping[str, Any], card: str) -> None:
    """Write a new PEFT folder: weights as safetensors, configuration and README."""
    with new_folder(path) as draft:
        write_bytes(draft / WEIGHTS, weights)
        write_json(draft / CONFIG, config)
        write_bytes(draft / "README.md", card.encode())


def _hosts(run: Result, updates: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the class of every adapted layer; raise a ValueError if PEFT needs more than it to load an update."""
    hosts = run.meta.hosts
    if hosts is None:
        raise ValueError(
            f"cannot export {run.reference}: it did not record its adapted layers (old version); train it again"
        )
    hosts = join_hosts(hosts)
    for name in updates:
        if hosts[name] in ("Conv1d", "Conv2d", "Conv3d"):
            reason = f"the kernel shape of {name} ({hosts[name]}) was not recorded"
            raise ValueError(f"cannot export {run.reference}: {reason}; use the folder that PEFT saved")
    return hosts


def _merge_trained_weights(
    run: Result,
    exporter: RunExporter,
    updates: dict[str, Any],
    weights: dict[str, np.ndarray],
    hosts: Mapping[str, str],
) -> None:
    """Move the updates of weights that trained as well into these weights: PEFT saves an adapter or a weight."""
    merged = [name for name in updates if f"{name}.weight" in weights]
    if merged and len(merged) == len(updates):
        raise ValueError(f"cannot export {run.reference}: no adapter is left, because all adapted weights also trained")
    for name in merged:
        W, update = weights[f"{name}.weight"], updates.pop(name)
        if hosts[name] == "Linear":
            weights[f"{name}.weight"] = exporter.merge(update, W)
        else:  # all others store their weight as (in, out)
            weights[f"{name}.weight"] = exporter.merge(update, W.T).T
    for name in updates:
        if f"{name}.bias" in weights:
            reason = f"the trained bias of adapted module {name} is not supported; use the folder that PEFT saved"
            raise ValueError(f"cannot export {run.reference}: {reason}")


def require_all_recorded(run: Result, state: str) -> None:
    """Raise a ValueError if a PEFT folder of a run would lack parameters that were trained but not recorded.

    A recording stores the factors and the trained parameters of the base model.
    """
    recorded = 0
    for factors in run.factors(state=state).values():
        recorded += sum(array.size for name, array in factors.items() if name not in constant_factors())
        if run.meta.method.get("kind") == "ADALORA" and "A" in factors:  # its diagonals are stored as part of A
            recorded += len(factors["A"])
    file = TensorFile(cast(Run, run).state_file(state))
    recorded += sum(math.prod(file.shape(name)) for name in file)
    # The difference is negative if a factor was frozen.
    if (missing := run.meta.parameters.trained - recorded) > 0:
        raise ValueError(
            f"cannot restore the adapter of {run.reference}: {missing:,} trained parameters, such as biases "
            "of the factors, were not recorded; use the folder that PEFT saved"
        )


def _other_weights(run: Result, state: str) -> dict[str, np.ndarray]:
    """Return the weights that trained in addition to the adapters, by parameter name."""
    file = TensorFile(cast(Run, run).state_file(state))
    adapted = run.ranks(state)
    # Names with a slash are method state; a name without a dot is a buffer of the model itself, which PEFT cannot save.
    weights = {}
    for name in file:
        if "." in name and "/" not in name and name.partition(".delta.")[0] not in adapted:
            weights[name] = file[name]
    return weights


def _owners(run: Result, weights: Mapping[str, np.ndarray]) -> list[str]:
    """Return ``modules_to_save``; for a head of several layers, it is their parent, as in PEFT."""
    roots = _head_roots(run)
    owners: dict[str, None] = {}  # a set in the order of the file
    for name in weights:
        module = name.rpartition(".")[0]
        root = next((root for root in roots if f"{module}.".startswith(f"{root}.")), module)
        owners[root] = None
    return list(owners)


def _head_roots(run: Result) -> list[str]:
    """Return the parent of every layer of the classifier head, or the layer itself without one."""
    if run.meta.labels is None:
        return []
    heads = run.modules.loc[run.modules["role"] == "head", "module"]
    return [head.rpartition(".")[0] or head for head in heads]


def _peft_task_type(run: Result, saved: list[str]) -> str | None:
    if run.meta.task_kind in _UNTYPED:
        return None
    recorded = run.meta.task_type
    if recorded is not None and recorded not in _AUTO:
        raise ValueError(
            f"cannot export {run.reference}: task_type must be one of {', '.join(_AUTO)}, got {recorded}; "
            "use the folder that PEFT saved"
        )
    if recorded not in (None, "SEQ_CLS"):
        return recorded
    if run.meta.labels is not None:  # PEFT always saves the head with SEQ_CLS, so it must have been trained
        return None if set(saved).isdisjoint(_head_roots(run)) else "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if {"encoder", "decoder"} <= set(run.modules["stack"]) else "CAUSAL_LM"


def base_of(run: Result) -> tuple[str, int | None]:
    """Return the name of the base in a run's PEFT folder, and its number of blocks if it was shortened, else None."""
    # (?s), because the path of a local model may contain a line break.
    name, blocks = re.fullmatch(r"(?s)(.*?)(?:, first (\d+) blocks)?", run.meta.model).groups()  # type: ignore[union-attr]
    return name, int(blocks) if blocks else None


def _base(run: Result) -> tuple[str, int | None]:
    """Return the same as `base_of`, with the name on the Hugging Face Hub for models that lorascope includes."""
    name, blocks = base_of(run)
    return _HUB.get(name, name), blocks


def _card(run: Result, config: Mapping[str, Any], kind: str, folder: str) -> str:
    """Return the README of the folder, which shows how to load the adapter."""
    labels, untyped = run.meta.labels, _UNTYPED.get(run.meta.task_kind or "")
    base, blocks = _base(run)
    arguments = [repr(base)]
    if blocks:
        arguments.append(f"num_hidden_layers={blocks}")
    if labels is not None:
        arguments += [f"num_labels={len(labels)}", f"id2label={dict(enumerate(labels))}"]
    auto = untyped or _AUTO[config["task_type"] or "SEQ_CLS"]
    # The base is in YAML, which includes JSON, and the label is in Markdown, which would read some of its characters.
    text = _CARD.format(
        base=base if re.fullmatch(r"[\w./-]+", base) else json.dumps(base),
        kind=kind,
        run=run.id,
        label=re.sub(r"([\\`*_\[\]<&])", r"\\\1", printable(run.label)),
        auto=auto,
        arguments=", ".join(arguments),
        folder=folder,
    )
    if config["task_type"] == "SEQ_CLS" or (untyped and config["modules_to_save"]):
        text += _HEAD_NOTE
    if base == _HUB["smollm2"]:
        text += _GGUF_NOTE
    if run.gates:
        text += _GATES_NOTE.format(gates=run.gates_label)
    return text
