"""Updates of an adapter that PEFT merges into its base model, for the kinds that only PEFT can compute.

dW = W_merged - W_0, in float64
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def merged_updates(
    adapter: Path, base: Path, config: Mapping[str, Any]
) -> tuple[dict[str, tuple[Float[np.ndarray, "out in"], bool]], set[str]]:
    """Merge an adapter with PEFT, and subtract the base.

    Parameters
    ----------
    adapter, base : path
        Folders of the adapter and of its base model.
    config : mapping
        Configuration of the adapter, which names the class of the model or its task.

    Returns
    -------
    mapping module -> (update, whether the base stores its weight as (in, out))
    set of str
        Names of the tensors that PEFT uses.

    Raises
    ------
    ValueError
        The model lacks modules of the adapter.
    """
    model = _load_base(base, config)
    before = {name: module.weight.detach().clone() for name, module in _weights(model)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuned = PeftModel.from_pretrained(model, adapter)
    if missing := next((str(each.message) for each in caught if "missing adapter keys" in str(each.message)), ""):
        raise ValueError(f"{type(model).__name__} has other modules: {missing}")
    used = set(get_peft_model_state_dict(tuned))
    changed = [name for name, module in tuned.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)]
    merged = dict(_weights(tuned.double().merge_and_unload()))
    return {name: _difference(merged[name], before[name]) for name in changed if name in merged}, used


def _load_base(base: Path, config: Mapping[str, Any]) -> nn.Module:
    architectures = transformers.AutoConfig.from_pretrained(base).architectures or []
    named = [(config.get("auto_mapping") or {}).get("base_model_class"), _TASKS.get(config.get("task_type") or "")]
    names = (name for name in [*named, *architectures, "AutoModel"] if name and hasattr(transformers, name))
    return getattr(transformers, next(names)).from_pretrained(base, dtype="auto", use_safetensors=True)


def _weights(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            yield name, module


def _difference(module: Any, before: torch.Tensor) -> tuple[Float[np.ndarray, "out in"], bool]:
    change = (module.weight.detach().double() - before.double()).numpy()
    transposed = isinstance(module, Conv1D | nn.Embedding)
    flat = change.reshape(len(change), -1)
    return (flat.T if transposed else flat), transposed
