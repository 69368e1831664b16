"""A run as PEFT reads it: the configuration of a next LoRA with its ranks, and the adapter itself as a folder.

Components with an exactly zero diagonal, which is how an allocator masks them, are in neither.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save

from lorascope.adapter_files import CONFIG, WEIGHTS
from lorascope.run import Run
from lorascope.summary import factored, peft_keywords
from lorascope.tensors import TensorFile, write_bytes, write_json
from lorascope.update import LowRank, spectra

_PREFIX = "base_model.model."
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

A LoRA adapter, written by lorascope from run {run} ({label}).

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


def rank_pattern(run: Run, budget: float | int | None = None, state: str = "last") -> dict[str, Any]:
    """PEFT's keywords for a LoRA with a run's ranks, or with as many of its components as a budget allows.

    Under a budget the components with the largest singular values of all modules together are kept, of equal ones those
    of the module that stands first; a module's rank is the number of its own among them. Every module keeps its scale.

    Parameters
    ----------
    run : Run
        Trained here, or an adapter that was read.
    budget : float or int, optional
        Up to 1 the share of all ranks that is kept, rounded, at least one component; a whole number from 2 on is the
        sum of the ranks.
    state : {"last", "best"}

    Returns
    -------
    dict
        See ``Run.lora_config``.

    Raises
    ------
    ValueError
        No module has a factored update of a rank above 0, one holds NaN, or there is no such budget.
    """
    updates = run.updates(state=state)
    ranks = {name: rank for name, rank in run.ranks(state).items() if name in updates and rank > 0}
    if budget is None or not ranks:
        return run.lora_config(state)
    products = factored(run, updates)
    return peft_keywords(run, _largest(ranks, products, _count(budget, sum(ranks.values()))), updates)


def _count(budget: float | int, total: int) -> int:
    if 0 < budget <= 1:
        return max(round(budget * total), 1)
    if budget >= 2 and float(budget).is_integer():
        if budget > total:
            raise ValueError(f"budget {budget:g} is more than the {total} components there are: give {total} or less")
        return int(budget)
    raise ValueError(f"budget {budget:g} is none: give a share, such as 0.5, or a sum of ranks, at most {total}")


def _largest(ranks: Mapping[str, int], updates: Mapping[str, LowRank], count: int) -> dict[str, int]:
    """How many of the ``count`` largest singular values are each module's."""
    sigmas = [np.empty(0)]
    for name, rank in ranks.items():
        sigma = spectra([updates[name]])[0][:rank]
        if not np.isfinite(sigma).all():
            raise ValueError(f"{name} holds NaN or infinity: it has no singular values to go by")
        sigmas.append(np.pad(sigma, (0, rank - len(sigma))))
    owner = np.repeat(np.arange(len(ranks)), list(ranks.values()))
    chosen = owner[np.argsort(-np.concatenate(sigmas), kind="stable")[:count]]
    return dict(zip(ranks, np.bincount(chosen, minlength=len(ranks)).tolist(), strict=True))


def to_peft(run: Run, out: str | Path, state: str = "last") -> Path:
    """Write a run's adapter, and what else it trained, as a folder that ``PeftModel.from_pretrained`` loads.

    Parameters
    ----------
    run : Run
        By a method with factored updates.
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
        The update is not of low rank, or nothing is left of it.
    """
    path = Path(out)
    if path.exists():
        raise FileExistsError(f"{path} exists: give a new folder")
    updates, weights = _updates(run, state), _weights(run, state)
    hosts = run.meta["hosts"]
    for name in [name for name in updates if f"{name}.weight" in weights]:  # PEFT has one or the other
        change = updates.pop(name).dense()
        weight = weights[f"{name}.weight"]
        weights[f"{name}.weight"] = weight + (change if hosts[name] == "Linear" else change.T).astype(weight.dtype)
    config = _config(run, updates, _owners(run, weights))
    tensors = {name: array for module, update in updates.items() for name, array in _named(module, update, hosts)}
    tensors |= {_PREFIX + name: weight for name, weight in weights.items()}
    draft = path.with_name(f".{path.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    write_bytes(draft / WEIGHTS, save(whole, metadata={"format": "pt"}))
    write_json(draft / CONFIG, config)
    write_bytes(draft / "README.md", _card(run, config, path.name).encode())
    draft.rename(path)
    return path


def in_use(update: LowRank, diagonal: Float[np.ndarray, "rank"] | None) -> LowRank:
    """The update without the components whose diagonal is exactly zero; None is a diagonal of ones."""
    if diagonal is None:
        return update
    used = diagonal != 0
    return LowRank(update.B[:, used], update.A[used], update.scale)


def _updates(run: Run, state: str) -> dict[str, LowRank]:
    """The update of every module with a component in use."""
    if "source" in run.meta:
        raise ValueError(f"{run.label} is an adapter of PEFT already: copy its folder, {run.path}")
    ranks, updates = run.ranks(state), factored(run, run.updates(state=state))
    unfit = next((name for name in ranks if not isinstance(updates.get(name), LowRank)), None)
    if not ranks or unfit is not None:
        where = f"that of {unfit} is" if unfit else "it changed the weights themselves, which is"
        raise ValueError(f"run {run.id} ({run.label}) has no low-rank updates to export: {where} not a product B A")
    if "hosts" not in run.meta:
        raise ValueError(f"run {run.id} does not say which layers it adapted: it is older than export, train it again")
    factors = run.factors(state=state)
    found = {name: in_use(update, factors[name].get("diagonal")) for name, update in updates.items()}
    return {name: update for name, update in found.items() if update.rank}


def _weights(run: Run, state: str) -> dict[str, np.ndarray]:
    """What trained besides the adapters, by parameter name."""
    file = TensorFile(run._file(f"state/{state}.safetensors"))
    adapted = run.ranks(state)
    # A path is the method's own state; a name without a dot is a buffer of the model itself, which PEFT cannot save.
    return {name: file[name] for name in file if "." in name and "/" not in name and not _of_adapter(name, adapted)}


def _of_adapter(name: str, adapted: Mapping[str, int]) -> bool:
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


def _config(run: Run, updates: Mapping[str, LowRank], saved: list[str]) -> dict[str, Any]:
    ranks = {name: update.rank for name, update in updates.items()}
    return {
        "peft_type": "LORA",
        "task_type": _task_type(run, saved),
        "base_model_name_or_path": _base(run)[0],
        "inference_mode": True,
        **peft_keywords(run, ranks, updates),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(run.meta["hosts"][name] == "Conv1D" for name in updates),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _task_type(run: Run, saved: list[str]) -> str | None:
    if run.meta["labels"] is not None:  # PEFT insists on saving a classifier's head, so it must have been trained
        return "SEQ_CLS" if set(_head_roots(run)) & set(saved) else None
    return "SEQ_2_SEQ_LM" if {"encoder", "decoder"} <= set(run.modules["stack"]) else "CAUSAL_LM"


def base_of(run: Run) -> tuple[str, int | None]:
    """What a run's base was loaded by, and its number of blocks where it was shortened."""
    name, blocks = re.fullmatch(r"(.*?)(?:, first (\d+) blocks)?", run.meta["model"]).groups()  # type: ignore[union-attr]
    return name, int(blocks) if blocks else None


def _base(run: Run) -> tuple[str, int | None]:
    """The same, by the name outside lorascope."""
    name, blocks = base_of(run)
    return _HUB.get(name, name), blocks


def _named(module: str, update: LowRank, hosts: Mapping[str, str]) -> list[tuple[str, np.ndarray]]:
    """Both factors under PEFT's names."""
    pattern = "lora_embedding_{}" if hosts[module] == "Embedding" else "lora_{}.weight"
    return [(f"{_PREFIX}{module}.{pattern.format(key)}", factor) for key, factor in (("A", update.A), ("B", update.B))]


def _card(run: Run, config: Mapping[str, Any], folder: str) -> str:
    """How the adapter is loaded, as the README of its folder."""
    labels = run.meta["labels"]
    base, blocks = _base(run)
    options = [f"num_hidden_layers={blocks}"] if blocks else []
    if labels is not None:
        options += [f"num_labels={len(labels)}", f"id2label={dict(enumerate(labels))}"]
    text = _CARD.format(
        base=base,
        run=run.id,
        label=run.label,
        auto=_AUTO[config["task_type"] or "SEQ_CLS"],
        arguments=", ".join([repr(base), *options]),
        folder=folder,
    )
    noted = (config["task_type"] == "SEQ_CLS") * _HEAD_NOTE + (base == _HUB["smollm2"]) * _GGUF_NOTE
    return text + noted
