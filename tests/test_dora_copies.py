"""Copies of W_0 in the updates of DoRA: shared while one exists, and never changed by a later change of the weight."""

from __future__ import annotations

import copy
import gc
import pickle

import numpy as np
import torch
from tiny import tiny

from lorascope.adapters.delta import attached_deltas, fold
from lorascope.methods import DoRA
from lorascope.methods.dora import DoRADelta

MODULE = "model.layers.0.self_attn.q_proj"


def adapted() -> tuple[torch.nn.Module, DoRADelta]:
    model = tiny("llama")
    DoRA(rank=2).attach(model)
    delta = attached_deltas(model)[MODULE]
    assert isinstance(delta, DoRADelta)
    torch.nn.init.normal_(delta.B)
    return model, delta


def test_updates_share_one_copy_while_it_exists() -> None:
    model, delta = adapted()
    first = delta.update()
    with torch.no_grad():
        delta.B.mul_(2)
    second = delta.update()
    assert first.W0 is second.W0
    assert not np.array_equal(first.B, second.B)
    weight = model.get_parameter(f"{MODULE}.weight")
    assert not np.shares_memory(first.W0, weight.numpy(force=True))
    reference = delta._copied.array
    del first, second
    gc.collect()
    assert reference() is None  # the Delta itself does not store one
    assert np.array_equal(delta.update().W0, weight.numpy(force=True))


def test_a_changed_weight_is_copied_again() -> None:
    model, delta = adapted()
    weight = model.get_parameter(f"{MODULE}.weight")
    first = delta.update()
    before, dense = first.W0.copy(), first.dense()
    with torch.no_grad():
        weight.add_(1)
    second = delta.update()
    assert np.array_equal(first.W0, before)
    assert np.array_equal(second.W0, weight.numpy(force=True))
    weight.data = weight.data + 1
    assert np.array_equal(delta.update().W0, weight.numpy(force=True))
    weight.requires_grad_(True)  # an optimizer may change it without a new version
    third, fourth = delta.update(), delta.update()
    assert third.W0 is not fourth.W0
    fold(model)
    assert np.array_equal(first.dense(), dense)


def test_adapted_models_with_a_copy_can_be_copied_and_pickled() -> None:
    model, delta = adapted()
    update = delta.update()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again = attached_deltas(twin)[MODULE].update()
        assert np.array_equal(again.dense(), update.dense())
        assert again.W0 is not update.W0
