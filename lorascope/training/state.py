"""Saving and restoring the state of a run in training: tensors, optimizer, random generators.

A checkpoint is one safetensors file. Tensors keep their dtype, everything else is JSON in the header, and a checksum
covers both. Optimizer state is stored by parameter name; it is restored by assignment, as ``load_state_dict`` casts it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lorascope.adapters.delta import attached_deltas
from lorascope.files.printable import printable
from lorascope.files.typed_json import parse_json, require_regular
from lorascope.files.whole_files import write_bytes
from lorascope.inputs.classifier_head import fit_head
from lorascope.inputs.models import missing
from lorascope.methods import METHODS
from lorascope.methods.method import AdapterMethod, Method, from_config, trained_parameters
from lorascope.runs.run import Run
from lorascope.training.base_weights import attach_method

# Key of the method's state in a state file; the other keys are parameter names.
_LEARNED = "method"
_BIT_GENERATORS = (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)


def save_tree(path: Path, tree: Any) -> None:
    """Write a state (nested dicts, lists, numbers, tensors, arrays, generators) to one safetensors file, atomically."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_pack(tree, "", tensors))
    write_bytes(path, save(tensors, metadata={"tree": _tree_digest(text, tensors) + text}))


def load_tree(path: Path) -> Any:
    """Read a state of ``save_tree``; tensors return to the kind of device they were on, or to the CPU without one.

    Raise a ValueError if the file is truncated or was changed.
    """
    require_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("tree", "")
            # Clone the tensors: rounding may depend on how their memory is aligned.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"cannot read {printable(path)} as safetensors: {printable(error)}") from None
    digest, text = header[:64], header[64:]
    if digest != _tree_digest(text, tensors):
        raise ValueError(f"cannot read {printable(path)}: its checksum does not match")
    tree = parse_json(text, path)
    try:
        return _unpack(tree, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, StopIteration) as error:
        raise ValueError(f"cannot read {printable(path)} as a state: {printable(error)}") from error


def _tree_digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        # As bytes, because numpy has no bfloat16.
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _add_tensor(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    """Add a copy of a tensor and return its name; safetensors rejects tensors that share memory."""
    name = path
    if name in tensors:
        name = f"{path}#{len(tensors)}"
    tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return name


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Tensor():
            return {"__tensor__": _add_tensor(value, path, tensors), "device": value.device.type}
        case np.ndarray():  # copied, because torch warns of an array that cannot be written to
            return {
                "__array__": _add_tensor(torch.from_numpy(np.array(value)), path, tensors),
                "dtype": value.dtype.str,
            }
        case torch.Generator():
            return {"__generator__": _add_tensor(value.get_state(), path, tensors), "device": value.device.type}
        case np.random.Generator():
            return {"__numpy__": _pack(value.bit_generator.state, path, tensors)}
        case np.generic():
            return value.item()
        case tuple():
            return {"__tuple__": _pack(list(value), path, tensors)}
        case list():
            return [_pack(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        case Mapping():
            inside = f"{path}/" if path else ""
            items = []
            for key, item in value.items():
                items.append([_pack(key, "", tensors), _pack(item, f"{inside}{key}", tensors)])
            return {"__items__": items}
    raise TypeError(f"cannot save {path or 'the state'}: a run folder cannot store a {type(value).__name__}")


def _unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "__items__" in tree:
        return {_unpack(key, tensors): _unpack(value, tensors) for key, value in tree["__items__"]}
    if "__tuple__" in tree:
        return tuple(_unpack(tree["__tuple__"], tensors))
    if "__array__" in tree:
        return tensors[tree["__array__"]].numpy().astype(tree["dtype"])
    if "__numpy__" in tree:
        stored = _unpack(tree["__numpy__"], tensors)
        bits = next(kind for kind in _BIT_GENERATORS if kind.__name__ == stored["bit_generator"])()
        bits.state = stored
        return np.random.Generator(bits)
    device = tree["device"]
    if device != "cpu" and not torch.accelerator.is_available():
        device = "cpu"
    if "__generator__" in tree:
        generator = torch.Generator(device)
        generator.set_state(tensors[tree["__generator__"]])
        return generator
    return tensors[tree["__tensor__"]].to(device)


def frozen_names(model: nn.Module) -> list[str]:
    """Return the names of frozen parameters, which do not require gradients, as part of the state."""
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def freeze(model: nn.Module, names: Collection[str]) -> None:
    """Let all parameters require gradients, except for the frozen names of a state."""
    frozen = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def trained_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state that training may change, by name: the optimizer's parameters, new weights and buffers."""
    trained = set(map(id, trained_parameters(optimizer)))
    new = missing(model)
    tensors = {name: p for name, p in model.named_parameters() if id(p) in trained or name in new}
    for module, delta in attached_deltas(model).items():
        tensors |= {f"{module}.delta.{name}": parameter for name, parameter in delta.named_parameters()}
    # Other buffers are computed again from the configuration, such as the frequencies of rotary embeddings.
    persistent = model.state_dict(keep_vars=True)
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, method: Method) -> None:
    """Write the state that ``restore`` needs: the trained tensors by parameter name, and the method's state."""
    save_tree(path, {**trained_tensors(model, optimizer), _LEARNED: method.state()})


def read_state(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Return the trained tensors by parameter name, and the method's state, of a file of :func:`save_state`."""
    stored = load_tree(path)
    if not isinstance(stored, dict) or _LEARNED not in stored:
        raise ValueError(f"cannot restore from {printable(path)}: it has no state of a method")
    return stored, stored.pop(_LEARNED)


def load_state(model: nn.Module, method: Method, tensors: Mapping[str, Tensor], learned: Any) -> None:
    """Load the trained tensors, and the state of a method that is attached to the model."""
    method.restore(learned)
    load_tensors(model, tensors)


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a state's tensors into parameters and buffers of the same names, or replace those of another shape."""
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    unknown = sorted(tensors.keys() - targets.keys())
    if unknown:
        raise ValueError(f"cannot load {unknown[0]}: the model has no such tensor; use the base model that was trained")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if targets[name].shape == tensor.shape:
                targets[name].copy_(tensor)
            else:  # a factor of an adapter whose rank has changed
                targets[name].data = tensor.to(targets[name].device)


def fingerprint(optimizer: torch.optim.Optimizer) -> str:
    """Return a hash of the first 8 entries of every trained parameter, which links a state to its weights."""
    digest = hashlib.sha256()
    for parameter in trained_parameters(optimizer):
        digest.update(parameter.detach().reshape(-1)[:8].double().cpu().numpy().data)
    return digest.hexdigest()


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the groups and the state of an optimizer, with parameter names instead of parameters."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = list(map(dict, optimizer.param_groups))
    for group in groups:
        del group["params"]
    return {
        "groups": groups,
        "state": {name_of[id(parameter)]: dict(state) for parameter, state in optimizer.state.items()},
    }


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]) -> None:
    """Restore the result of ``optimizer_state`` by assignment."""
    parameters = dict(model.named_parameters())
    for group, values in zip(optimizer.param_groups, stored["groups"], strict=True):
        group.update(values)
    optimizer.state.clear()
    for name, state in stored["state"].items():
        optimizer.state[parameters[name]] = dict(state)


def generators_state() -> dict[str, Any]:
    """Return the states of the global random generators of torch, CUDA, numpy and Python."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (kind, keys, int(position), int(has_gauss), float(cached)),
        "python": random.getstate(),
    }


def load_generators_state(stored: Mapping[str, Any]) -> None:
    """Restore the result of ``generators_state``."""
    torch.set_rng_state(stored["torch"])
    for device, state in enumerate(stored["cuda"][: torch.cuda.device_count()]):  # there may be fewer now
        torch.cuda.set_rng_state(state.cpu(), device)
    np.random.set_state(stored["numpy"])
    random.setstate(stored["python"])


@contextmanager
def keep_generators() -> Iterator[None]:
    """Restore the states of all global generators after the context."""
    before = generators_state()
    try:
        yield
    finally:
        load_generators_state(before)


@contextmanager
def seed_generators(seed: int) -> Iterator[None]:
    """Seed all global generators within the context, and restore the caller's states afterwards."""
    with keep_generators():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield


def restore(model: nn.Module, run: Run, path: Path, method: Method | None = None) -> None:
    """Restore the state of a run on a fresh base model: attach its method, load the tensors; see ``Run.restore``."""
    if attached_deltas(model):
        raise ValueError("cannot restore into a model that already has adapters; load a fresh base model")
    config = run.meta.method
    if config["name"] == "peft":
        raise ValueError(
            f"cannot restore run {run.id}: PEFT trained it; export it with ls.export.to_peft and load it with PEFT"
        )
    state = read_state(path)
    # The new head has the names and the shape of the trained one, whose tensors are loaded below.
    fit_head(model, run.meta.labels)
    if method is None and config["name"] not in METHODS:
        raise ValueError(f"cannot restore run {run.id}: its method {config['name']!r} is not registered; pass method=")
    try:
        method = method or from_config(config)
    except TypeError as error:
        raise ValueError(
            f"cannot restore run {printable(run.id)}: its fields do not fit its method: {printable(error)}"
        ) from error
    if isinstance(method, AdapterMethod):
        method.splits_fused = bool(run.meta.weight_parts)
    attach_method(method, model)
    load_state(model, method, *state)
    model.eval()
