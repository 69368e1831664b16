"""Valid folders of every format, written by hand, and random changes that spoil them."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import resource
import shutil
import signal
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from contract.format_rows_imagefiles import diffusers, kohya, mlx
from gguf_bytes import ADAPTER, array, text, value, write_gguf
from planted import manifest
from safetensors.numpy import save

from lorascope.cli.main import main
from lorascope.files.whole_files import file_hash, write_json
from lorascope.runs.writer import RunWriter
from lorascope.schema.records import Factors, Record, Snapshot

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OUT, IN, RANK = 6, 5, 2

MODULE = {"stack": "", "role": "q", "out_features": 3, "in_features": 3, "tied": ""}
RUN: dict[str, Any] = {
    "schema": 1,
    "id": "0123456789ab",
    "label": "LoRA, rank 2",
    "model": "m",
    "task": "t",
    "method": {"name": "lora", "rank": 2, "targets": "attention"},
    "recipe": {"name": "lora", "rank": 2},
    "settings": {"steps": 9, "batch_size": 4, "lr": 0.1, "observers": [{"name": "norms", "every": 3}]},
    "seed": 0,
    "parents": [],
    "parameters": {"trained": 12, "total": 20},
    "test": {"name": "accuracy", "metric": 0.5, "loss": 0.7, "groups": {}},
    "labels": ["no", "yes"],
    "hosts": {"h.0.q": "Linear"},
    "w0_hash": "ab",
    "data_hash": "cd",
    "seconds": 1.0,
    "total_seconds": 1.0,
    "modules": [{"module": f"h.{layer}.q", "layer": layer} | MODULE for layer in range(3)],
    "states": {"last": {"step": 9, "ranks": {"h.0.q": 2, "h.1.q": 2}}},
}


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def write(folder: Path, config: dict[str, Any] | None, tensors: dict[str, np.ndarray], prefix: str = PREFIX) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        write_json(folder / CONFIG, config)
    (folder / WEIGHTS).write_bytes(save({prefix + name: array for name, array in tensors.items()}, {"format": "pt"}))
    return folder


def factors(*names: str, suffix: str = ".weight") -> dict[str, np.ndarray]:
    shapes = {"A": (RANK, IN), "B": (OUT, RANK), "E": (RANK, 1), "magnitude_vector": (OUT,)}
    return {f"{m}.lora_{n}{suffix}": draw(*shapes[n], seed=i) for i, m in enumerate((Q, V)) for n in names}


COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": "somebody/model",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "peft_version": "0.21.2",
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}
LORA = COMMON | {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "rank_pattern": {"q_proj": 2, r".*\.1\..*v_proj": 2},
    "alpha_pattern": {"v_proj": 16},
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "layers_to_transform": None,
}


def lora(root: Path) -> Path:
    return write(root / "adapter", LORA, factors("A", "B") | {"classifier.weight": draw(2, IN), "q.bias": draw(OUT)})


def dora(root: Path) -> Path:
    tensors = factors("A", "B") | factors("magnitude_vector", suffix="")
    return write(root / "adapter", LORA | {"use_dora": True}, tensors)


def adalora(root: Path) -> Path:
    kept = {f"{Q}.lora_E": [True, False, True], f"{V}.lora_E": [True, True, False]}
    config = COMMON | {"peft_type": "ADALORA", "init_r": 3, "lora_alpha": 8, "target_r": 2, "rank_pattern": kept}
    return write(root / "adapter", config, factors("A", "B", "E", suffix=""))


def fourier(root: Path) -> Path:
    config = COMMON | {"peft_type": "FOURIERFT", "n_frequency": 4, "scaling": 10.0, "random_loc_seed": 7}
    config |= {"n_frequency_pattern": {"v_proj": 3}}
    return write(root / "adapter", config, {f"{Q}.fourierft_spectrum": draw(4), f"{V}.fourierft_spectrum": draw(3)})


def hydra(root: Path) -> Path:
    tensors = {f"{Q}.lora_A.weight": draw(RANK, IN), f"{Q}.lora_route.weight": draw(3, IN)}
    tensors |= {f"{Q}.lora_B{number}.weight": draw(OUT, RANK, seed=number) for number in range(3)}
    return write(root / "adapter", LORA | {"r": RANK, "rank_pattern": {}}, tensors)


def loralib(root: Path) -> Path:
    tensors = {f"{Q}.lora_A": draw(2 * RANK, IN), f"{Q}.lora_B": draw(2 * OUT, RANK)}
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "enable_lora": [True, False, True]}
    return write(root / "adapter", config, tensors, prefix="")


def bare(root: Path) -> Path:
    return write(root / "adapter", None, factors("A", "B", suffix=""), prefix="")


def pretrained(folder: Path) -> Path:
    """Write a base model of both modules in two shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = {f"model-0000{number + 1}-of-00002.safetensors": name for number, name in enumerate((Q, V))}
    for number, (shard, name) in enumerate(shards.items()):
        tensors = {f"{name}.weight": draw(OUT, IN, seed=10 + number), f"{name}.bias": draw(OUT)}
        (folder / shard).write_bytes(save(tensors, {"format": "pt"}))
    where = {f"{name}.{part}": shard for shard, name in shards.items() for part in ("weight", "bias")}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": where})
    return folder


def trained(folder: Path, **meta: Any) -> Path:
    writer = RunWriter(folder, manifest(**copy.deepcopy(RUN) | meta))
    for step in (0, 9):
        rows = [Record("loss", 1.0 - step / 20), Record("lr", 0.1)]
        rows += [Record(name, 1.0 + step, f"h.{n}.q") for name in ("update_norm", "weight_norm") for n in (0, 1)]
        A, B = draw(2, 3), draw(3, 2, seed=step)
        mixed = {"A": A, "B": np.stack([B, B]), "gates": np.array([0.5, 0.5])}
        arrays = [Factors("h.0.q", {"A": A, "B": B}, 2.0), Factors("h.1.q", mixed, 1.0, exact=False)]
        seen = Snapshot("h.2.q/seen", draw(2, 3), ("head", "text"), {"head": ["one", "two"]})
        writer.collect(step, [*rows, Record("importance", np.ones(2), "h.0.q"), *arrays, seen])
    writer.finish("done")
    return folder


def run(root: Path) -> Path:
    return trained(root / "run")


def phases(root: Path) -> Path:
    trained(root / "run" / "1-search", id="a" * 12)
    trained(root / "run" / "2-retrain", parents=["../1-search"])
    write_json(root / "run" / "recipe.json", {"id": "0" * 12, "status": "done", "phases": ["1-search", "2-retrain"]})
    return root / "run"


def lycoris(root: Path) -> Path:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    shapes = {"hada_w1_a": (OUT, RANK), "hada_w1_b": (RANK, IN), "hada_w2_a": (OUT, RANK), "hada_w2_b": (RANK, IN)}
    tensors = {f"{name}.{factor}": draw(*shape, seed=i) for i, (factor, shape) in enumerate(shapes.items())}
    return write(root / "adapter", None, tensors | {f"{name}.alpha": draw()}, prefix="")


def gguf_lora(root: Path) -> Path:
    (root / "adapter").mkdir(parents=True)
    pair = {"blk.0.attn_q.weight.lora_a": draw(RANK, IN), "blk.0.attn_q.weight.lora_b": draw(OUT, RANK)}
    tokens = value(b"tokenizer.ggml.tokens", 9, array(8, 2, text(b"a") + text(b"b")))
    alpha = value(b"adapter.lora.alpha", 6, struct.pack("<f", 8.0))
    write_gguf(root / "adapter" / "lora.gguf", pair, *ADAPTER, tokens, alpha)
    return root / "adapter"


def by_row(write: Callable[[Path, Path], Any]) -> Callable[[Path], Path]:
    """Return a function that writes the adapter of a row of the contract."""

    def make(root: Path) -> Path:
        write(root / "adapter", root / "base")
        return root / "adapter"

    return make


FORMATS: dict[str, Callable[[Path], Path]] = {
    "lora": lora,
    "dora": dora,
    "adalora": adalora,
    "fourier": fourier,
    "hydra": hydra,
    "loralib": loralib,
    "bare": bare,
    "lycoris": lycoris,
    "kohya": by_row(kohya),
    "diffusers": by_row(diffusers),
    "mlx": by_row(mlx),
    "gguf": gguf_lora,
    "run": run,
    "phases": phases,
}
WITH_BASE = ("lora", "dora", "adalora", "fourier", "hydra")


class TooLong(BaseException):
    """A reader exceeded its time limit."""


@contextlib.contextmanager
def limits(seconds: float = 5.0, gigabytes: float = 2.0) -> Iterator[None]:
    """Limit CPU time, wall-clock time (to twelve times as much) and the growth of the address space."""

    def stop(*_: Any) -> None:
        raise TooLong(f"more than {seconds} CPU seconds, or {12 * seconds} on the clock")

    space = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    used = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize() if statm.exists() else 0
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGPROF)}
    try:
        if used:
            resource.setrlimit(resource.RLIMIT_AS, (used + int(gigabytes * 2**30), space[1]))
        signal.setitimer(signal.ITIMER_REAL, 12 * seconds)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        yield
    finally:
        for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, space)


def readable(folder: Path) -> Path:
    """Return the path of the adapter or run in a folder: GGUF files are read by their own path."""
    return next(folder.glob("*.gguf"), folder)


def read_all(folder: Path, base: Path | None = None) -> None:
    """Read everything in a folder through the library."""
    from lorascope.diagnosis import doctor
    from lorascope.diagnosis.inspection import inspect
    from lorascope.runs.adapter import Adapter
    from lorascope.runs.loading import load

    found = load(readable(folder), base)
    _ = found.id, found.modules, found.ranks() if found.meta.states else {}, repr(found)
    doctor.diagnose(found)
    inspect(found).to_json()
    _ = found.table, found.parents
    if not isinstance(found, Adapter):
        for name in found.snapshot_names():
            found.snapshot(name)


def outcome(act: Callable[[], Any], **limit: float) -> str:
    """Return the one printable line that ``act`` raises, "" if it succeeds; anything else fails the test."""
    with limits(**limit), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # about values that overflow
        try:
            act()
        except (ValueError, OSError) as error:
            raised = error
        else:
            return ""
    assert not isinstance(raised, UnicodeError), raised
    message = str(raised)
    assert message.isprintable(), message
    return message


def command(*words: str) -> tuple[int, str]:
    """Return the exit code and stderr of a command line, after checking that its output is printable."""
    errors, output = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
        code = main(words)
    for line in (errors.getvalue() + output.getvalue()).split("\n"):
        assert line.isprintable(), line
    return code, errors.getvalue()


# -- edits ---------------------------------------------------------------------------------------------------------


def header(file: Path) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a safetensors file."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put_header(file: Path, content: Any, data: bytes) -> None:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def edit_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content, data = header(file)
    put_header(file, change(content) or content, data)


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_bytes())
    file.write_text(json.dumps(change(content) or content), encoding="utf-8")


def sign(folder: Path) -> None:
    """Write correct checksums to every run.json below a folder, so that only the content is wrong."""
    for file in folder.rglob("run.json"):
        with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, OSError):
            meta = json.loads(file.read_bytes())
            for name in meta["checksums"]:
                meta["checksums"][name] = file_hash(file.parent / name)
            file.write_text(json.dumps(meta), encoding="utf-8")


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 2**31, 2**62, 2**63, 10**30, 10**400, 0.5, -0.0, 1e30, 1e308),
    *(float("nan"), float("inf"), "", "8", "\x1b[2J\n", "a\u202eb", "\ud800", "\0", "../../etc/passwd", "/etc/passwd"),
    *(".", "..", "~nobody/x", "(", "(a+)+$", "(a|aa)*x", "F32", "BF16", "F8_E4M3", "x" * 5000, "layers.99999.q_proj"),
    *([], [[]], [None], ["a", 1], [0, 8], [-1, 1], [2**62, 2**62], [1] * 40, {}, {"a": {}}, {"q_proj": None}),
)


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a JSON value."""
    below = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(place for key, value in below for place in places(value, (*path, key)))]


def edited(content: Any, rng: random.Random) -> Any:
    """Change one place of a JSON value: replace, delete or rename it, or copy another part of the value."""
    found = places(content)
    *above, last = rng.choice(found[1:]) if len(found) > 1 else (None,)
    if last is None:
        return rng.choice(VALUES)
    spot = content
    for key in above:
        spot = spot[key]
    match rng.randrange(6):
        case 0:
            del spot[last]
        case 1 if isinstance(spot, dict):
            spot[rng.choice([*map(str, VALUES), f"{last}0", f"{last}.lora_A.weight"])] = spot.pop(last)
        case 2:
            donor = content
            for key in rng.choice(found):
                donor = donor[key]
            spot[last] = copy.deepcopy(donor)
        case _:
            # Half of the replacements have the same type, so that more of them pass the type checks.
            same = [value for value in VALUES if type(value) is type(spot[last])] if rng.random() < 0.5 else ()
            spot[last] = copy.deepcopy(rng.choice(same or VALUES))
    return content


def edited_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, duplicate or overwrite bytes."""
    data, place = bytearray(raw), rng.randrange(len(raw) + 1)
    match rng.randrange(4):
        case 0:
            for _ in range(rng.choice((1, 1, 4, 64))):
                if data:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            del data[place:]
        case 2:
            data[place:place] = data[: rng.randrange(64)]
        case _:
            data[place : place + 8] = rng.randbytes(8)
    return bytes(data)


def edited_table(raw: bytes, rng: random.Random) -> bytes:
    """Drop a column of a Parquet table, change its rows, or set a column to other values or types."""
    table = pd.read_parquet(io.BytesIO(raw))
    name = rng.choice(list(table.columns))
    size = len(table)
    columns: list[Any] = [
        [None] * size, ["x"] * size, ["\x1b[2J"] * size, [-1] * size, [2**62] * size, [float("nan")] * size,
        [0.5] * size, [True] * size, [b"\xff"] * size, [[1]] * size, list(range(size)), ["1"] * size,
    ]  # fmt: skip
    match rng.randrange(5):
        case 0:
            table = table.drop(columns=name)
        case 1:
            table = table.iloc[: rng.choice((0, 1))]
        case 2:
            table = pd.concat([table, table])
        case _:
            table[name] = rng.choice(columns)
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def spoiled(case: Path, template: Path, base: Path | None, seed: int) -> None:
    """Copy a valid folder and its base below ``case``, and change up to three files at random."""
    rng = random.Random(seed)
    shutil.copytree(template, case / "folder")
    if base is not None:
        shutil.copytree(base, case / "base")
    for _ in range(rng.choice((1, 1, 2, 3))):
        spoil(case if base is not None and rng.random() < 0.3 else case / "folder", rng)
    if rng.random() < 0.8:
        sign(case)


def spoil(folder: Path, rng: random.Random) -> None:
    """Change one file of a folder, depending on its type."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    file = rng.choice(files)
    raw = file.read_bytes()
    # A file that an earlier change broke may stay unchanged.
    with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, OverflowError, OSError):
        if file.suffix == ".json" and rng.random() < 0.9:
            file.write_text(json.dumps(edited(json.loads(raw), rng)), encoding="utf-8")
        elif file.suffix == ".safetensors" and rng.random() < 0.8:
            content, data = header(file)
            about = content.get("__metadata__", {}).get("about")
            if about and rng.random() < 0.5:
                content["__metadata__"]["about"] = json.dumps(edited(json.loads(about), rng))
            else:
                content = edited(content, rng)
            put_header(file, content, data)
        elif file.suffix == ".parquet" and rng.random() < 0.7:
            file.write_bytes(edited_table(raw, rng))
        else:
            file.write_bytes(edited_bytes(raw, rng))
