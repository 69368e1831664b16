"""Round trips through checkpoint files: all kinds of values, tensors, optimizers and random generators."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorascope as ls
from lorascope.training.state import (
    generators_state,
    load_generators_state,
    load_optimizer_state,
    load_tree,
    optimizer_state,
    save_tree,
)


def round_trip(tree, tmp_path):
    save_tree(tmp_path / "tree.safetensors", tree)
    return load_tree(tmp_path / "tree.safetensors")


PLAIN = {
    "numbers": [0, -1, 2**100, 0.1, 1e-300, float("inf"), True, None],
    "text": "Grüße, 世界",
    "a tuple": (1, (2.5, "x"), []),
    "empty": {},
    7: {"int keys": {1: "one", -2: "two"}, (3, "k"): "a tuple as key", None: 1.5, True: "yes"},
}


def test_plain_values_survive_a_round_trip(tmp_path):
    found = round_trip(PLAIN, tmp_path)
    assert found == PLAIN
    assert [type(key) for key in found] == [str, str, str, str, int]
    assert type(found["a tuple"]) is type(found["a tuple"][1]) is tuple
    assert [type(key) for key in found[7]] == [str, tuple, type(None), bool]
    assert np.isnan(round_trip({"loss": float("nan")}, tmp_path)["loss"])
    assert round_trip([np.float32(0.1), np.int64(3), np.bool_(True)], tmp_path) == [float(np.float32(0.1)), 3, True]


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)])
def test_tensors_of_every_dtype_and_shape_survive_a_round_trip(dtype, shape, tmp_path):
    tensor = (torch.randn(shape) * 3).to(dtype)
    found = round_trip({"t": tensor}, tmp_path)["t"]
    assert (found.dtype, found.shape) == (dtype, tensor.shape)
    assert torch.equal(found, tensor)


def test_shared_sliced_and_nonfinite_tensors_survive_a_round_trip(tmp_path):
    shared = torch.randn(4, 4)
    parameter = nn.Parameter(torch.randn(2))
    tree = {"a": shared, "b": shared, "transposed": shared.T, "slice": shared[:, 1:3], "parameter": parameter}
    tree |= {"nan": torch.tensor([float("nan"), float("-inf"), -0.0])}
    found = round_trip(tree, tmp_path)
    for name, tensor in tree.items():
        assert torch.equal(found[name].view(torch.int32), tensor.detach().contiguous().view(torch.int32)), name
    assert not found["parameter"].requires_grad
    found["a"].zero_()
    assert torch.equal(found["b"], shared)


def test_keys_with_the_same_path_stay_distinct(tmp_path):
    one, two, three = torch.ones(1), 2 * torch.ones(1), 3 * torch.ones(1)
    found = round_trip({"a": {"b": one}, "a/b": two, 1: {"x": three}, "1": {"x": one}}, tmp_path)
    assert [found["a"]["b"], found["a/b"], found[1]["x"], found["1"]["x"]] == [one, two, three, one]


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i8", "u1", "?", "u2", "u4", "u8"])
def test_arrays_survive_a_round_trip(dtype, tmp_path):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    found = round_trip(
        {"array": array, "fortran": np.asfortranarray(array), "scalar": array[1, 1:2].reshape(())}, tmp_path
    )
    for name, expected in (("array", array), ("fortran", array), ("scalar", array[1, 1])):
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], expected)
    found["array"][0, 0] = 1  # not a read-only view of the file


@pytest.mark.parametrize("bits", ["PCG64", "MT19937", "Philox", "SFC64"])
def test_numpy_generators_continue_after_a_round_trip(bits, tmp_path):
    generator = np.random.Generator(getattr(np.random, bits)(3))
    generator.normal(size=5)
    found = round_trip([generator], tmp_path)[0]
    np.testing.assert_array_equal(found.normal(size=9), generator.normal(size=9))


def test_torch_generators_continue_after_a_round_trip(tmp_path):
    generator = torch.Generator().manual_seed(5)
    torch.randn(3, generator=generator)  # an odd number, so that the generator stores half of a pair of normal numbers
    found = round_trip({"g": generator}, tmp_path)["g"]
    assert torch.equal(torch.randn(9, generator=found), torch.randn(9, generator=generator))


CONTINUE = """
import random, sys
from pathlib import Path
import numpy as np, torch
from lorascope.training.state import generators_state, load_generators_state, load_tree, save_tree, seed_generators

def draws():
    return torch.randn(3).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1), random.random()

with seed_generators(11):
    first = draws()
    save_tree(Path(sys.argv[1]), generators_state())
    expected = draws()
    draws()
    load_generators_state(load_tree(Path(sys.argv[1])))
    assert draws() == expected != first
with seed_generators(11):
    assert draws() == first
"""


def test_global_generators_continue_after_a_round_trip(tmp_path):
    # In a process of its own: threads that other tests leave behind also draw from the global generators.
    command = [sys.executable, "-c", CONTINUE, str(tmp_path / "tree.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_saving_an_unsupported_value_names_its_path(tmp_path):
    with pytest.raises(TypeError, match=r"deep/er.* set"):
        save_tree(tmp_path / "tree.safetensors", {"deep": {"er": {1, 2}}})
    assert not list(tmp_path.iterdir())


def test_tensors_are_stored_under_their_paths(tmp_path):
    round_trip({"model": {"layer.weight": torch.ones(2)}, "plain": torch.zeros(1), "list": [torch.ones(1)]}, tmp_path)
    assert set(load_file(tmp_path / "tree.safetensors")) == {"model/layer.weight", "plain", "list/0"}


def test_equal_trees_give_equal_files(tmp_path):
    tree = PLAIN | {str(number): torch.full((2,), float(number)) for number in range(20)}
    files = []
    for name in ("a", "b"):
        save_tree(tmp_path / name, tree)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("place", ["header", "tensor", "end"])
def test_changed_file_is_rejected(place, tmp_path):
    path = tmp_path / "tree.safetensors"
    save_tree(path, {"text": "abc", "t": torch.arange(100.0)})
    data = bytearray(path.read_bytes())
    where = {"header": data.index(b"abc"), "tensor": len(data) - 200, "end": len(data) - 1}[place]
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"tree\.safetensors.*checksum"):
        load_tree(path)
    path.write_bytes(data[:-4])
    with pytest.raises(ValueError, match=r"tree\.safetensors as safetensors"):
        load_tree(path)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_optimizer_continues_after_a_round_trip(kind, tmp_path):
    """The weights are bfloat16 and the state is float32: ``load_state_dict`` would cast it."""

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).to(torch.bfloat16)
        groups = [{"params": model[0].parameters(), "lr": 0.1, "name": "adapter"}, {"params": model[1].parameters()}]
        return model, kind(groups, lr=0.01, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))

    def step(model, optimizer, number):
        optimizer.zero_grad()
        model(torch.full((1, 4), float(number), dtype=torch.bfloat16)).square().sum().backward()
        optimizer.step()

    model, optimizer = build()
    for number in range(3):
        step(model, optimizer, number)
    for parameter, state in optimizer.state.items():
        state["wide"] = torch.randn(parameter.shape)
    optimizer.param_groups[0]["lr"] = 0.05
    tree = {"model": dict(model.state_dict()), "optimizer": optimizer_state(model, optimizer)}
    stored = round_trip(tree, tmp_path)
    other, continued = build()
    other.load_state_dict(stored["model"])
    load_optimizer_state(other, continued, stored["optimizer"])
    assert [group["lr"] for group in continued.param_groups] == [0.05, 0.01]
    for (one, first), (two, second) in zip(optimizer.state.items(), continued.state.items(), strict=True):
        assert torch.equal(one, two)
        assert first.keys() == second.keys()
        assert all(torch.equal(torch.as_tensor(first[key]), torch.as_tensor(second[key])) for key in first)
        assert second["wide"].dtype == torch.float32
    for number in range(3, 6):
        step(model, optimizer, number)
        step(other, continued, number)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_process_that_only_restores_finds_the_registered_methods(bert, task, tmp_path):
    ls.train(bert, task, ls.LoRA(), steps=1, batch_size=4, out=tmp_path / "run", progress=False, eval_size=8)
    code = (
        "import lorascope as ls\n"
        f"model = ls.models.load({bert!r})\n"
        f"ls.load({str(tmp_path / 'run')!r}).restore(model)\n"
        "print(sum('delta' in name for name, _ in model.named_parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "8", done.stderr[-500:]


def test_generators_of_more_devices_than_there_are_now_are_left_out(monkeypatch):
    stored = generators_state() | {"cuda": [torch.zeros(16, dtype=torch.uint8)] * 2}
    restored = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append(device))
    load_generators_state(stored)
    assert restored == [0]
