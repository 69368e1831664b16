"""Ways to spoil a sound adapter of any format: its bytes, its header, its tensors, its names, its configuration."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf_bytes
import numpy as np
from gguf_bytes import ADAPTER, write_gguf
from hostile import edit_header, header, put_header
from safetensors.numpy import load_file, save

from lorascope.files.gguf_io import GgufFile

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HOSTILE = ("../../etc/passwd", "\x1b[31mred", "<script>x</script>", "a\nb", "\u202ea", "%s{0}$\\", "=1+1", "..")
"""Parts of names that escape from a folder, a terminal, a page or a table."""

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Target:
    """Copy of a sound adapter that may be spoiled, and one of its modules."""

    folder: Path
    module: str

    @property
    def path(self) -> Path:
        """The path by which the adapter is read."""
        return self.folder

    @property
    def weights(self) -> Path:
        """The weight file."""
        return self.folder / WEIGHTS

    @property
    def tensors(self) -> Tensors:
        """The tensors of the weight file."""
        return load_file(self.weights)

    @property
    def config(self) -> Path:
        """The configuration, which may not exist."""
        return self.folder / CONFIG

    def edit(self, change: Callable[[Tensors], Tensors]) -> None:
        """Replace the tensors; the metadata of the header stays."""
        about = header(self.weights)[0].get("__metadata__")
        self.weights.write_bytes(save(change(self.tensors), about))

    def configure(self, **changes: Any) -> None:
        """Change settings of the configuration."""
        self.config.write_text(json.dumps(json.loads(self.config.read_bytes()) | changes), encoding="utf-8")


@dataclass(frozen=True)
class GgufTarget(Target):
    """As ``Target``, but a GGUF file; an edit replaces the metadata by that of an adapter."""

    @property
    def path(self) -> Path:
        return self.weights

    @property
    def weights(self) -> Path:
        return self.folder / "lora.gguf"

    @property
    def tensors(self) -> Tensors:
        return dict(GgufFile(self.weights))

    def edit(self, change: Callable[[Tensors], Tensors]) -> None:
        write_gguf(self.weights, change(self.tensors), *ADAPTER)


Spoil = Callable[[Target], Any]


def spoils(target: Target) -> Iterator[tuple[str, Spoil]]:
    """Yield the ways to spoil a sound adapter, with their names."""
    yield from _bytes(target)
    yield from _headers(target)
    yield from _alphas(target)
    yield from _tensors(target)
    yield from _names(target)
    yield from _configurations(target)
    yield from _folders()


def gguf_spoils(target: GgufTarget) -> Iterator[tuple[str, Spoil]]:
    """Yield the ways to spoil a sound GGUF file, with their names; test_gguf.py has those of its header."""
    whole = target.weights.stat().st_size
    for size in (*range(0, whole, 29), whole - 1):
        yield f"cut to {size} bytes", _cut(size)
    yield from _tensors(target)
    yield from _names(target)
    alpha, name = b"adapter.lora.alpha", b"general.base_model.0.name"
    alphas = [(6, struct.pack("<f", number)) for number in (float("nan"), float("inf"), -1.0, 0.0, 3e38)]
    alphas += [(8, gguf_bytes.text(b"8")), (9, gguf_bytes.array(6, 1, bytes(4))), (10, b"\xff" * 8), (7, b"\2")]
    values = [gguf_bytes.value(alpha, kind, content) for kind, content in alphas]
    values += [gguf_bytes.value(name, 8, gguf_bytes.text(piece.encode())) for piece in HOSTILE]
    for value in values:
        yield (
            f"metadata {value!r}",
            lambda target, value=value: write_gguf(target.weights, target.tensors, *ADAPTER, value),
        )


# -- bytes and header ----------------------------------------------------------------------------------------------


def _cut(size: int) -> Spoil:
    return lambda target: target.weights.write_bytes(target.weights.read_bytes()[:size])


def _length(length: int) -> Spoil:
    return lambda target: target.weights.write_bytes(length.to_bytes(8, "little") + target.weights.read_bytes()[8:])


def _bytes(target: Target) -> Iterator[tuple[str, Spoil]]:
    whole = target.weights.stat().st_size
    start = int.from_bytes(target.weights.read_bytes()[:8], "little") + 8
    for size in (0, 1, 7, 8, 9, start // 2, start - 1, start, start + 1, (start + whole) // 2, whole - 1):
        yield f"cut to {size} bytes", _cut(size)
    for length in (0, 1, start - 9, start - 7, 2**31, 2**63, 2**64 - 1):
        yield f"header of {length} bytes", _length(length)
    yield "four bytes more", lambda target: target.weights.write_bytes(target.weights.read_bytes() + b"more")
    yield "pickle", lambda target: target.weights.write_bytes(pickle.dumps({"a.lora_A.weight": [1.0]}, 2))
    yield "archive", lambda target: target.weights.write_bytes(b"PK\x03\x04" + bytes(60))


def _entry(name: str, **changes: Any) -> Spoil:
    return lambda target: edit_header(target.weights, lambda content: content[name].update(changes))


def _twice(name: str) -> Spoil:
    def spoil(target: Target) -> None:
        content, data = header(target.weights)
        entry = json.dumps({name: content[name]}).encode()
        put_header(target.weights, json.dumps(content).encode()[:-1] + b", " + entry[1:], data)

    return spoil


def _headers(target: Target) -> Iterator[tuple[str, Spoil]]:
    content, data = header(target.weights)
    content.pop("__metadata__", None)
    first, second, *_ = sorted(content)
    begin, end = content[first]["data_offsets"]
    for offsets in ([-4, end], [begin, len(data) * 2], [end, begin], content[second]["data_offsets"], [0, 2**62]):
        yield f"offsets {offsets}", _entry(first, data_offsets=offsets)
    for dtype in ("I32", "U32", "F64", "BF16", "F8_E4M3", "f32", "\x1b[31m", ""):
        yield f"dtype {dtype!r}", _entry(first, dtype=dtype)
    yield "a tensor of null", lambda target: edit_header(target.weights, lambda content: content | {first: None})
    yield "a tensor twice in the header", _twice(first)
    for about in ([], "x", {"format": 5}, {"ss_base_model_version": "\x1b[31m\n"}, {"lora_adapter_metadata": "{"}):
        yield (
            f"metadata {about!r}",
            lambda target, about=about: edit_header(target.weights, lambda content: content | {"__metadata__": about}),
        )


# An alpha that is not one number, not finite, or not the rank's sign
ALPHAS: Mapping[str, np.ndarray] = {
    "NaN": np.float32(np.nan),
    "infinity": np.float32(np.inf),
    "-1": np.float32(-1),
    "0": np.float32(0),
    "of two values": np.ones(2, "f4"),
    "of no value": np.ones(0, "f4"),
    "of an integer": np.int64(4),
}


def _alphas(target: Target) -> Iterator[tuple[str, Spoil]]:
    for what, alpha in ALPHAS.items():
        yield (
            f"alpha {what}",
            lambda target, alpha=alpha: target.edit(
                lambda tensors: tensors | {f"{target.module}.alpha": np.asarray(alpha)}
            ),
        )
    for value in ("8", None, -1, 1e400, [8]):
        about = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": value, "unet.r": 2})}
        about |= {"ss_network_alpha": str(value), "ss_network_dim": str(value)}
        yield (
            f"metadata with alpha {value!r}",
            lambda target, about=about: edit_header(target.weights, lambda content: content | {"__metadata__": about}),
        )


# -- tensors and names ---------------------------------------------------------------------------------------------


def _replaced(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    return lambda target: target.edit(lambda tensors: tensors | {name: np.ascontiguousarray(change(tensors[name]))})


def _one(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flat[0] = value
        return array

    return change


CHANGES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "transposed": lambda array: array.T,
    "with a row more": lambda array: np.concatenate([array, array[:1]]),
    "without a row": lambda array: array[1:],
    "with a column more": lambda array: np.concatenate([array, array[..., :1]], -1),
    "with an axis more": lambda array: array[None],
    "empty": lambda array: array[:0],
    "a single number": lambda array: array.reshape(-1)[0],
    "with NaN": _one(np.nan),
    "with infinity": _one(np.inf),
    "of huge numbers": lambda array: np.full_like(array, 3e38),
    "of negative numbers": lambda array: -np.abs(array) - 1,
    "zero": np.zeros_like,
    "of float16": lambda array: array.astype(np.float16),
    "of bytes": lambda array: array.astype(np.uint8),
}


def _tensors(target: Target) -> Iterator[tuple[str, Spoil]]:
    for name, array in target.tensors.items():
        if target.module not in name and name.count(".") > 1:  # of another module
            continue
        for what, change in CHANGES.items():
            if array.dtype != np.float32 and what not in ("empty", "with a row more", "of negative numbers", "zero"):
                continue
            if array.ndim or "row" not in what:
                yield f"{name} {what}", _replaced(name, change)


def _added(name: str) -> Spoil:
    return lambda target: target.edit(lambda tensors: tensors | {name: np.ones((2, 2), "f4")})


def _renamed(old: str, new: str) -> Spoil:
    return lambda target: target.edit(
        lambda tensors: {name.replace(old, new): array for name, array in tensors.items()}
    )


def _respelled(name: str) -> str:
    prefix = "base_model.model."
    return name.removeprefix(prefix) if name.startswith(prefix) else prefix + name


def _names(target: Target) -> Iterator[tuple[str, Spoil]]:
    first = sorted(target.tensors)[0]
    leaf = target.module.rpartition(".")[2]
    for piece in HOSTILE:
        yield f"modules named {piece!r}", _renamed(leaf, leaf + piece)
        yield f"a tensor more {piece!r}", _added(piece)
        yield f"a bias more {piece!r}", _added(f"{piece}.bias")
    yield "an empty name", _added("")
    yield "modules without a name", _renamed(target.module, "")
    yield "a name of 900 letters", _added("x" * 900)
    yield "a name of 10,000 letters", _added("x" * 10_000)
    yield "an unrelated weight", _added("vae.decoder.conv_in.weight")
    yield (
        "a tensor in two spellings",
        lambda target: target.edit(lambda tensors: tensors | {_respelled(first): tensors[first] + 1}),
    )
    yield (
        "a tensor with the name of an adapter, too",
        lambda target: target.edit(
            lambda tensors: (
                tensors
                | {f"{first.removesuffix('.weight')}.default{'.weight' * first.endswith('.weight')}": tensors[first]}
            )
        ),
    )


# -- configuration -------------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (None, 0, -1, 10**9, "\x1b[31m\n", [], 0.5, True, float("nan"), 10**400)


# Settings that some format uses; others may have them, too.
SETTINGS = (
    *("r", "alpha", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "fan_in_fan_out"),
    *("init_lora_weights", "layer_replication", "trainable_token_indices", "target_parameters", "enable_lora"),
    *("alora_invocation_tokens", "base_model_name_or_path", "peft_version", "fine_tune_type", "lora_parameters"),
)


def _set(key: str, value: Any) -> Spoil:
    return lambda target: target.configure(**{key: value})


def _without(key: str) -> Spoil:
    def spoil(target: Target) -> None:
        config = json.loads(target.config.read_bytes())
        del config[key]
        target.config.write_text(json.dumps(config))

    return spoil


def _configurations(target: Target) -> Iterator[tuple[str, Spoil]]:
    contents = (b"", b"[]", b"null", b"{", b"{}", b'{"a":' * 10**5, b"\xff\xfe{\0}\0", b'"text"')
    for content in contents:
        yield f"configuration {content[:10]!r}", lambda target, content=content: target.config.write_bytes(content)
    if not target.config.exists():
        return
    known = json.loads(target.config.read_bytes())
    for key in known:
        yield f"no {key}", _without(key)
    # Formats have many settings in common: each gets three values, which differ between formats.
    for number, key in enumerate(dict.fromkeys([*known, *SETTINGS]), len(known)):
        for value in (VALUES[(number + step) % len(VALUES)] for step in (0, 3, 7)):
            yield f"{key} = {str(value)[:20]!r}", _set(key, value)
    for kind in ("NEW", "\x1b[31m\n", "LORA", "ADALORA", "LOHA", "VERA", "IA3", "PROMPT_TUNING", "POLY", "BEFT", "OSF"):
        yield f"peft_type {kind!r}", _set("peft_type", kind)


# -- folder --------------------------------------------------------------------------------------------------------


def _kohya() -> bytes:
    module = "lora_unet_mid_block_attentions_0_proj_in"
    return save({f"{module}.lora_{side}.weight": np.ones((2, 2), "f4") for side in ("up", "down")})


def _folders() -> Iterator[tuple[str, Spoil]]:
    yield "no tensors", lambda target: target.weights.write_bytes(save({}))
    yield "a second adapter", lambda target: (target.folder / "other\x1b.safetensors").write_bytes(_kohya())
    yield (
        "two formats in a file",
        lambda target: target.edit(
            lambda tensors: (
                tensors | {f"lora_unet_x.lora_{side}.weight": np.ones((2, 2), "f4") for side in ("up", "down")}
            )
        ),
    )
    yield "a pickle next to it", lambda target: (target.folder / "adapter_model.bin").write_bytes(b"\x80\x02")
