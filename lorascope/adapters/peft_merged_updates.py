"""Updates of an adapter that PEFT merges into its base model, for the kinds that only PEFT can compute.

dW = W_merged - W_0, in float64
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorascope.array_types import Float
from lorascope.inputs.models import quiet, require_own_attention

_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def merged_updates(
    adapter: Path, base: Path, model_class: str | None = None, task: str | None = None
) -> tuple[dict[str, tuple[Float[np.ndarray, "out in"], bool]], set[str]]:
    """Compute the updates that PEFT merges into the base of an adapter: merge, and subtract the base.

    Parameters
    ----------
    adapter, base : path
        Folders of the adapter and of its base model.
    model_class, task : str, optional
        Class of the model in transformers, or its task in PEFT, such as ``"CAUSAL_LM"``; by default the class that the
        base names.

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
    with quiet():
        model = _load_base(base, model_class, task)
    before = {name: module.weight.detach().clone() for name, module in _weights(model)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuned = PeftModel.from_pretrained(model, adapter)
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise ValueError(f"{type(model).__name__} has other modules: {warning.message}")
    used = set(get_peft_model_state_dict(tuned))
    changed = [name for name, module in tuned.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)]
    merged = dict(_weights(tuned.double().merge_and_unload()))
    return {name: _difference(merged[name], before[name]) for name in changed if name in merged}, used


def _load_base(base: Path, model_class: str | None, task: str | None) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
    require_own_attention(config, base)
    candidates = [model_class, _TASKS.get(task or ""), *(config.architectures or []), "AutoModel"]
    names = (name for name in candidates if name and hasattr(getattr(transformers, name, None), "from_pretrained"))
    # Code of the base model's folder is never run.
    options = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False}
    return getattr(transformers, next(names)).from_pretrained(base, **options)


def _weights(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            yield name, module


def _difference(module: Any, before: torch.Tensor) -> tuple[Float[np.ndarray, "out in"], bool]:
    change = (module.weight.detach().double() - before.double()).numpy()
    flat = change.reshape(len(change), -1)
    if isinstance(module, Conv1D | nn.Embedding):
        return flat.T, True
    return flat, False
