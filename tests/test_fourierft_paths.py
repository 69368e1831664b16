"""Test that FourierFT's basis form and transform agree after any move or copy, without stale waves."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_fourierft import by_definition, drawn
from tiny import inputs, tiny
from torch import Tensor, nn

from lorascope.adapters.delta import attach, attached_deltas
from lorascope.methods import FourierFT
from lorascope.methods.fourierft import FourierDelta, use_basis_form
from lorascope.updates import fourier

SIDES = (24, 40)
PATHS = pytest.mark.parametrize("n", [3, 200], ids=["waves", "transform"])


def adapter(n: int, dtype: torch.dtype = torch.float64) -> FourierDelta:
    c, places = drawn(SIDES, n)
    assert use_basis_form(n, SIDES) == (n == 3)
    return FourierDelta(c.to(dtype), places, SIDES, 50)


def batch(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, SIDES[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def expected(delta: FourierDelta, x: Tensor) -> Tensor:
    return F.linear(x.double(), by_definition(delta.coefficients.double(), delta.entries, SIDES, 50))


# Relative accuracy of each dtype: a few of its units, summed over a row.
DTYPES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-5, torch.float16: 2**-8}


@PATHS
def test_every_dtype_matches_the_definition_in_any_order(n: int) -> None:
    """Dtypes follow each other, so that waves cached for one dtype would be wrong in the next."""
    for order in (list(DTYPES), list(DTYPES)[::-1]):
        delta = adapter(n)
        for dtype in order:
            delta.to(dtype)
            y = delta(batch(dtype))
            wanted = expected(delta, batch(dtype))
            assert y.dtype == dtype
            assert (y - wanted).norm() <= DTYPES[dtype] * wanted.norm()


@PATHS
def test_adapter_may_be_wider_than_its_host(n: int) -> None:
    """Coefficients of a bfloat16 model are float32, regardless of the dtype of the activations."""
    delta = adapter(n, torch.float32)
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16, torch.float64):
        y = delta(batch(dtype))
        wanted = expected(delta, batch(dtype))
        assert y.dtype == dtype
        assert (y - wanted).norm() <= max(DTYPES[dtype], DTYPES[torch.float32]) * wanted.norm()


def test_float16_is_accurate_for_a_small_update_of_a_wide_weight() -> None:
    """alpha c / (d1 d2) itself rounds to zero in float16."""
    shape = (2048, 2048)
    places = torch.from_numpy(fourier.entries(shape, 4, 0))
    delta = FourierDelta(torch.tensor([0.02, -0.01, 0.03, 0.005]), places, shape, 300)
    x = torch.randn(3, 2048, generator=torch.Generator().manual_seed(0))
    wanted = F.linear(x.double(), by_definition(delta.coefficients.double(), places, shape, 300))
    assert (delta.half()(x.half()).double() - wanted).norm() <= 2**-7 * wanted.norm()


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@PATHS
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_copy_gives_the_same_output_and_is_independent(n: int, copied: Callable[[nn.Module], nn.Module]) -> None:
    delta = adapter(n)
    before = delta(batch())
    twin = copied(delta)
    assert torch.equal(twin(batch()), before)
    with torch.no_grad():
        twin.coefficients.add_(1)
        twin.entries.copy_(twin.entries.flip(1))
    assert torch.equal(delta(batch()), before)
    assert (twin(batch()) - expected(twin, batch())).abs().max() < 1e-12


def test_pickle_excludes_the_cached_waves() -> None:
    delta = adapter(3)
    fresh = len(pickle.dumps(delta))
    delta(batch())
    assert len(pickle.dumps(delta)) == fresh


@PATHS
def test_training_works_after_a_call_in_inference_mode(n: int) -> None:
    delta = adapter(n)
    x = batch().requires_grad_()
    with torch.inference_mode():
        seen = delta(batch())
    y = delta(x)
    assert torch.equal(y, seen)
    y.square().sum().backward()
    assert delta.coefficients.grad.any()
    assert x.grad.any()


@PATHS
def test_entries_changed_in_inference_mode_take_effect(n: int) -> None:
    delta = adapter(n)
    delta(batch())
    with torch.inference_mode():
        delta.entries.copy_(delta.entries.flip(1))
        assert (delta(batch()) - expected(delta, batch())).abs().max() < 1e-12
        made = adapter(n)
        made(batch())
        made.entries.copy_(made.entries.flip(1))
        assert (made(batch()) - expected(made, batch())).abs().max() < 1e-12


@PATHS
def test_adapter_follows_its_host_to_another_device_and_back(n: int) -> None:
    """The "meta" device exists everywhere; it has only shapes, but a tensor left on the CPU would raise."""
    host = nn.Linear(*SIDES[::-1], dtype=torch.float64)
    attach(host, {"": adapter(n)})
    before = host(batch())
    values = {name: value.clone() for name, value in host.state_dict().items()}
    host.to("meta")
    away = host(batch().to("meta"))
    assert (away.device.type, away.shape) == ("meta", before.shape)
    host.to_empty(device="cpu")
    host.load_state_dict(values)
    assert torch.equal(host(batch()), before)


@pytest.mark.parametrize("coefficients", [3, 200])
def test_model_moved_to_bfloat16_and_back_equals_its_rounded_state(coefficients: int) -> None:
    model = tiny("bert")
    FourierFT(coefficients=coefficients).attach(model)
    model(**inputs(model))
    model.to(torch.bfloat16)
    model(**inputs(model))
    model.to(torch.float32)
    fresh = tiny("bert")
    FourierFT(coefficients=coefficients).attach(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(**inputs(model)).logits, fresh(**inputs(fresh)).logits)
    assert all(delta.coefficients.dtype == torch.float32 for delta in attached_deltas(model).values())
