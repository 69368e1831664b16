"""A run's adapter as a folder that PEFT loads: LoRA or FourierFT, and what else was trained."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile, write_bytes, write_json
from lorascope.runs.export import peft_fourierft, peft_lora
from lorascope.runs.folders import new_folder, require_absent
from lorascope.runs.formats.peft_lora import CONFIG, PREFIX, WEIGHTS
from lorascope.runs.run import Run
from lorascope.updates.factor_formats import UNTRAINED

_HUB = {"minilm": "sentence-transformers/all-MiniLM-L6-v2", "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
_KINDS = {"LORA": "LoRA", "FOURIERFT": "FourierFT"}
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
_HEAD_NOTE = "\nThe head that was trained is in the adapter; the base needs one of the same size, as above.\n"
_GGUF_NOTE = (
    "\nThe run was trained on a 4-bit copy of this base, so that on the original its outputs differ a little.\n"
)
_GATES_NOTE = (
    "\nThis is HydraLoRA at {gates}, without its routers: its outputs are near, but not those of the model that was "
    "trained.\n"
)


def to_peft(run: Run, out: str | Path, state: str = "last") -> Path:
    """Write a run's adapter, and what else it trained, as a folder that ``PeftModel.from_pretrained`` loads.

    Parameters
    ----------
    run : Run
        By a method whose updates are products of two factors, which become a LoRA, or by FourierFT. HydraLoRA as
        ``at_gates`` shows it is a LoRA too: exactly that at these gates, and no more than near HydraLoRA itself.
    out : path
        A new folder.
    state : {"last", "best"}

    Returns
    -------
    path
        The folder. Its README.md tells how to load it.

    Raises
    ------
    FileExistsError
        The folder is there already.
    ValueError
        The update is neither, nothing is left of it, or it has what PEFT's FourierFT cannot express.
    """
    path = Path(out)
    require_absent(path)
    if "source" in run.meta:
        what = "holds HydraLoRA, which no folder of PEFT does: export a run that was trained here, at fixed gates"
        read = what if run.input_dependent_modules() else f"is an adapter of PEFT already: copy its folder, {run.path}"
        raise ValueError(f"{run.label} {read}")
    if run.meta["method"]["name"] == "peft":
        refuse_unkept(run, state)
    form = peft_fourierft if peft_fourierft.has_coefficients(run, state) else peft_lora
    updates, weights = form.updates_of(run, state), _other_weights(run, state)
    if "hosts" not in run.meta:
        raise ValueError(f"run {run.id} does not say which layers it adapted: it is older than export, train it again")
    hosts = run.meta["hosts"]
    rolled = next((name for name in updates if hosts[name] in ("Conv1d", "Conv2d", "Conv3d")), None)
    if rolled is not None:
        told = f"adapted {rolled}, a {hosts[rolled]}, whose update is kept as a matrix, without the shape of its kernel"
        raise ValueError(f"run {run.id} ({run.label}) {told}: give the folder that PEFT saved")
    for name in [name for name in updates if f"{name}.weight" in weights]:  # PEFT has one or the other
        change = updates.pop(name).dense()
        weight = weights[f"{name}.weight"]
        weights[f"{name}.weight"] = weight + (change if hosts[name] == "Linear" else change.T).astype(weight.dtype)
    biased = next((name for name in updates if f"{name}.bias" in weights), None)
    if biased is not None:
        told = f"trained the bias of {biased} beside its adapter, and such biases are not exported"
        raise ValueError(f"run {run.id} ({run.label}) {told}: give the folder that PEFT saved")
    config = _adapter_config(run, form.keywords(run, updates), _owners(run, weights), updates)
    tensors = {name: part for module in updates for name, part in form.tensors(module, updates[module], hosts[module])}
    whole = {PREFIX + name: np.ascontiguousarray(array) for name, array in (tensors | weights).items()}
    with new_folder(path) as draft:
        write_bytes(draft / WEIGHTS, save(whole, metadata={"format": "pt"}))
        write_json(draft / CONFIG, config)
        write_bytes(draft / "README.md", _card(run, config, path.name).encode())
    return path


def refuse_unkept(run: Run, state: str) -> None:
    """Raise a ValueError where PEFT trained more than its recording keeps: factors, and what trained of the base."""
    factors = list(run.factors(state=state).values())
    kept = sum(array.size for each in factors for name, array in each.items() if name not in UNTRAINED)
    if run.meta["method"].get("kind") == "ADALORA":  # its diagonals are kept within A
        kept += sum(len(each["A"]) for each in factors if "A" in each)
    held = TensorFile(run.state_file(state))
    kept += sum(math.prod(held.shape(name)) for name in held)
    # Fewer trained than is kept where a factor was frozen.
    if (beside := run.meta["parameters"]["trained"] - kept) > 0:
        raise ValueError(
            f"run {run.id} ({run.label}) keeps factors and what trained of the base, and not the {beside:,} other "
            "parameters that trained, such as biases of the factors: give the folder that PEFT saved"
        )


def _other_weights(run: Run, state: str) -> dict[str, np.ndarray]:
    """What trained besides the adapters, by parameter name."""
    file = TensorFile(run.state_file(state))
    adapted = run.ranks(state)
    # A path is the method's own state; a name without a dot is a buffer of the model itself, which PEFT cannot save.
    return {
        name: file[name] for name in file if "." in name and "/" not in name and not _is_adapter_weight(name, adapted)
    }


def _is_adapter_weight(name: str, adapted: Mapping[str, int]) -> bool:
    module, delta, _ = name.partition(".delta.")
    return bool(delta) and module in adapted


def _owners(run: Run, weights: Mapping[str, np.ndarray]) -> list[str]:
    """The modules that PEFT has to save whole: of a head with several layers their parent, as PEFT itself does."""
    roots = _head_roots(run)
    owners = [name.rpartition(".")[0] for name in weights]
    found = (next((root for root in roots if f"{owner}.".startswith(f"{root}.")), owner) for owner in owners)
    return list(dict.fromkeys(found))


def _head_roots(run: Run) -> list[str]:
    """The children of the model that hold a classifier's head."""
    if run.meta["labels"] is None:
        return []
    heads = run.modules.loc[run.modules["role"] == "head", "module"]
    return [head.rpartition(".")[0] or head for head in heads]


def _adapter_config(run: Run, keywords: Mapping[str, Any], saved: list[str], adapted: Iterable[str]) -> dict[str, Any]:
    return {
        "task_type": _peft_task_type(run, saved),
        "base_model_name_or_path": _base(run)[0],
        "inference_mode": True,
        **keywords,
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(run.meta["hosts"][name] == "Conv1D" for name in adapted),
        "bias": "none",
    }


def _peft_task_type(run: Run, saved: list[str]) -> str | None:
    if _is_image_model(run):
        return None  # PEFT has no type for images
    told = run.meta.get("task_type")
    if told is not None and told not in _AUTO:
        known = f"{', '.join(_AUTO)}: give the folder that PEFT saved"
        raise ValueError(f"run {run.id} ({run.label}) trained for {told}, and export knows {known}")
    if told not in (None, "SEQ_CLS"):
        return str(told)
    if run.meta["labels"] is not None:  # PEFT insists on saving a classifier's head, so it must have been trained
        return "SEQ_CLS" if set(_head_roots(run)) & set(saved) else None
    return "SEQ_2_SEQ_LM" if {"encoder", "decoder"} <= set(run.modules["stack"]) else "CAUSAL_LM"


def _is_image_model(run: Run) -> bool:
    """Does the run's model classify images?"""
    return run.meta.get("task_kind") == "image"


def base_of(run: Run) -> tuple[str, int | None]:
    """What a run's base was loaded by, and its number of blocks where it was shortened."""
    name, blocks = re.fullmatch(r"(?s)(.*?)(?:, first (\d+) blocks)?", run.meta["model"]).groups()  # type: ignore[union-attr]
    return name, int(blocks) if blocks else None


def _base(run: Run) -> tuple[str, int | None]:
    """The same, by the name outside lorascope."""
    name, blocks = base_of(run)
    return _HUB.get(name, name), blocks


def _card(run: Run, config: Mapping[str, Any], folder: str) -> str:
    """How the adapter is loaded, as the README of its folder."""
    labels = run.meta["labels"]
    base, blocks = _base(run)
    options = [f"num_hidden_layers={blocks}"] if blocks else []
    if labels is not None:
        options += [f"num_labels={len(labels)}", f"id2label={dict(enumerate(labels))}"]
    text = _CARD.format(
        base=base if re.fullmatch(r"[\w./-]+", base) else json.dumps(base),
        kind=_KINDS[config["peft_type"]],
        run=run.id,
        label=re.sub(r"([\\`*_\[\]<&])", r"\\\1", printable(run.label)),
        auto="AutoModelForImageClassification" if _is_image_model(run) else _AUTO[config["task_type"] or "SEQ_CLS"],
        arguments=", ".join([repr(base), *options]),
        folder=folder,
    )
    head = config["task_type"] == "SEQ_CLS" or (_is_image_model(run) and bool(config["modules_to_save"]))
    noted = head * _HEAD_NOTE + (base == _HUB["smollm2"]) * _GGUF_NOTE
    return text + noted + (_GATES_NOTE.format(gates=run.meta["gates"]) if run.gates else "")
