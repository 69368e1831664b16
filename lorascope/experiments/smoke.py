"""Stand-ins that try a recipe in seconds and offline: a tiny model, generated rows, and a few steps."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel

from lorascope.inputs import models, package_assets, tasks
from lorascope.inputs.splits import sources_by_split
from lorascope.inputs.tasks import Task

STEPS, ROWS = 4, 20
"""Steps of a run, and rows per split of the source."""
_WIDTH, _LENGTH, _WORDS = 32, 32, 8
# The BLEU of texts with fewer than four words is zero.
_BEAMS, _NEW_TOKENS = 2, 10
_EDGE = 16  # pixels of an image
_SIZES = {
    "hidden_size": _WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 2 * _WIDTH,
    "max_position_embeddings": 2 * _LENGTH,
}
_SEQ2SEQ_SIZES = {
    "d_model": _WIDTH,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 2 * _WIDTH),
    "max_position_embeddings": 2 * _LENGTH,
}
_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
_FILLERS = tuple(f"word{number}" for number in range(24))
_CLASSES = ("bad", "good")


class Smoke(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Trial of a recipe.

    Parameters
    ----------
    architecture : str
        Type of the tiny model, by its name in transformers, such as "deberta-v2".
    methods : mapping
        Fields to replace by name of a method or of a row, such as the numbers of steps of its schedule.
    metrics : mapping
        Metrics to compute instead of others, by their names, such as those that require Java.
    """

    architecture: str = "bert"
    methods: dict[str, dict[str, Any]] = {}
    metrics: dict[str, str] = {}

    def model(self, kind: str = "classification") -> str:
        """Return the folder of a model for a kind of task, with two blocks of width 32; the first call writes it."""
        writes_texts, reads_images = kind in ("prompt", "choice", "lm"), kind == "image"

        def write(folder: Path) -> None:
            words = (*_TOKENS, *_FILLERS, *_CLASSES)
            default = transformers.AutoConfig.for_model(self.architecture)
            # Passed together, because other sizes follow from them, such as that of DeBERTa's pooler.
            sizes: dict[str, Any] = {key: size for key, size in _SIZES.items() if hasattr(default, key)}
            if default.is_encoder_decoder:
                sizes = dict(_SEQ2SEQ_SIZES)
            if writes_texts:
                # The defaults are tokens of a larger vocabulary.
                ends = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id")
                sizes |= dict.fromkeys([key for key in ends if hasattr(default, key)], words.index("[SEP]"))
            if reads_images:
                sizes |= {"image_size": _EDGE, "patch_size": _EDGE // 2}
            else:
                sizes |= {"vocab_size": len(words), "pad_token_id": 0}
            config = transformers.AutoConfig.for_model(self.architecture, num_labels=2, **sizes)
            with models.quiet(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                # Encoders have no head, as pretrained ones: all tasks have the same base weights then.
                head: Any = transformers.AutoModel
                if writes_texts:
                    head = transformers.AutoModelForCausalLM
                    if default.is_encoder_decoder:
                        head = transformers.AutoModelForSeq2SeqLM
                head.from_config(config).save_pretrained(folder)
            if reads_images:
                square = {"height": _EDGE, "width": _EDGE}
                transformers.ViTImageProcessor(size=square).save_pretrained(folder)
            else:
                tokenizer = _tokenizer(words, writes_texts)
                if writes_texts and default.is_encoder_decoder:
                    # As BART's, it ends each text, so that the model learns where to stop.
                    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                        single="$A [SEP]", special_tokens=[("[SEP]", words.index("[SEP]"))]
                    )
                tokenizer.save_pretrained(folder)

        name = f"smoke-base-{self.architecture}"
        if writes_texts:
            name += "-texts"
        return str(package_assets.build_once(package_assets.cache() / name, write))

    def task(self, entry: Any) -> Task:
        """Return a task with the splits, columns and kind of a task of a recipe, whose rows are generated.

        A label can be learned: a text contains it, or as many words "good" as the number says, or an image is brighter.
        Each prompt has two responses, or a choice of two and only its response in train, and most questions have an
        answer. The columns that the entry names define the kind.
        """
        table = entry if isinstance(entry, Mapping) else {"name": str(entry)}
        splits = table.get("splits")
        sources = ["train", "validation", "test"]
        # The column split has the words of the source, not of the task.
        if isinstance(splits, Mapping):
            # A part such as "train[10%:]" is taken from the generated split later.
            sources = sorted({re.split(r"\W", source)[0] for source in sources_by_split(splits).values()})
        generator = np.random.default_rng(0)
        if "image" in table.get("columns", {}):
            return tasks.from_frame(_images(sources, generator), table["name"], splits=splits or "given")
        if "context" in table.get("columns", {}):
            return tasks.from_frame(_questions(sources, generator), table["name"], splits=splits or "given")
        if "prompt_end" in table or "response" in table.get("columns", {}):
            return tasks.from_frame(_prompts(sources, generator), table["name"], splits=splits or "given")
        if "choices" in table.get("columns", {}):
            return tasks.from_frame(_quiz(sources, generator), table["name"], splits=splits or "given")
        rows = []
        for source, number in itertools.product(sources, range(ROWS)):
            words = generator.choice(_FILLERS, _WORDS).tolist()
            row: dict[str, Any] = {"split": source, "label": _CLASSES[number % 2]}
            if table.get("kind") == "regression":
                count = number % 5
                words[:count], row["label"] = ["good"] * count, count / 4
            else:
                words[0] = row["label"]
            row["text"] = " ".join(words)
            if "pair" in table.get("columns", {}):
                row["pair"] = " ".join(generator.choice(_FILLERS, _WORDS))
            # Plain text has no other column.
            if set(table.get("columns", {})) == {"text"}:
                del row["label"]
            rows.append(row)
        return tasks.from_frame(pd.DataFrame(rows), table["name"], splits=splits or "given", kind=table.get("kind"))

    def settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a recipe with a few steps on short texts; its kind of evaluation stays."""
        short = {"steps": STEPS, "batch_size": 4, "eval_every": STEPS // 2, "max_length": _LENGTH, "epochs": "none"}
        # As many warm-up steps as a quarter of the run, or the fraction of the recipe.
        short["warmup"] = min(settings.get("warmup", 0), 1)
        if (generation := settings.get("generation")) is not None:
            beams = min(generation.get("num_beams", 1), _BEAMS)
            short["generation"] = {**generation, "num_beams": beams, "max_new_tokens": _NEW_TOKENS}
        shortened = {**settings, **short, "accumulate": min(settings.get("accumulate", 1), 2)}
        # Quantization requires a package that a trial does not.
        shortened.pop("quantize", None)
        return shortened


def _images(sources: Iterable[str], generator: np.random.Generator) -> pd.DataFrame:
    """Return images of noise that is brighter in one class; they are wider than high, so that a crop differs."""
    rows = []
    for source, number in itertools.product(sources, range(ROWS)):
        pixels = generator.integers(0, 128, (_EDGE, 2 * _EDGE, 3)) + 127 * (number % 2)
        rows.append({"split": source, "image": pixels.astype(np.uint8), "label": _CLASSES[number % 2]})
    return pd.DataFrame(rows)


def _questions(sources: Iterable[str], generator: np.random.Generator) -> pd.DataFrame:
    """Return questions about contexts of several windows, whose answer follows the word of the question.

    Every fifth question has no answer, because its word is not in the context.
    """
    rows = []
    for source, number in itertools.product(sources, range(ROWS)):
        words = generator.choice(_FILLERS[1:], 2 * _LENGTH).tolist()
        row: dict[str, Any] = {"split": source, "question": _FILLERS[0], "answers": [], "answer_start": []}
        if number % 5:
            position = int(generator.integers(len(words) - 1))
            words[position] = _FILLERS[0]
            row["answers"], row["answer_start"] = [words[position + 1]], [len(" ".join(words[: position + 1])) + 1]
        rows.append({**row, "context": " ".join(words)})
    return pd.DataFrame(rows)


def _prompts(sources: Iterable[str], generator: np.random.Generator) -> pd.DataFrame:
    """Return rows whose responses are the words of their prompt, or the same words in another order."""
    rows = []
    for source, _ in itertools.product(sources, range(ROWS // 2)):
        words = generator.choice(_FILLERS, _WORDS).tolist()
        for order in (words, words[::-1]):
            rows.append({"split": source, "prompt": " ".join(words), "response": f" {' '.join(order)}"})
    return pd.DataFrame(rows)


def _quiz(sources: Iterable[str], generator: np.random.Generator) -> pd.DataFrame:
    """Return rows of train with the words of their prompt as response, and others with two choices."""
    rows = []
    for source, number in itertools.product(sources, range(ROWS)):
        prompt = " ".join(generator.choice(_FILLERS, _WORDS))
        row: dict[str, Any] = {"split": source, "prompt": prompt, "choices": [prompt], "answer": 0}
        if source != "train":
            row |= {"choices": list(_CLASSES), "answer": number % 2}
        rows.append(row)
    return pd.DataFrame(rows)


def _tokenizer(words: tuple[str, ...], writes_texts: bool) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, with one token before a text and one after each text, as BERT's has.

    That of a model that writes texts adds none, as GPT-2's.
    """
    numbers = {word: number for number, word in enumerate(words)}
    # Whole words, because pieces of words would have to be learned from text first.
    core = Tokenizer(WordLevel(numbers, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if writes_texts:
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]"
        )
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(token, numbers[token]) for token in ("[CLS]", "[SEP]")],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
