"""Generation of texts from prompts by a language model, in batches padded where the generated tokens do not follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from torch import Tensor, nn

from lorascope.array_types import Float, Int
from lorascope.files.predictions import collect_references
from lorascope.inputs import models
from lorascope.inputs.tasks import Task
from lorascope.inputs.tokenization import prompt_ids
from lorascope.methods.field_checks import is_integer, is_number, require, require_at_least, require_choice
from lorascope.schema.suggestions import unknown_name

SCOPES = ("generated", "all")


@dataclass(frozen=True, kw_only=True)
class Generation:
    r"""Settings of the generation of texts, without sampling.

    Parameters
    ----------
    max_new_tokens : int
        Maximum number of tokens of a text.
    num_beams : int
        Number of beams; 1 takes the most probable token at each position.
    length_penalty : float
        Power of its length by which the log-probability of a beam is divided.
    no_repeat_ngram : int
        Size of the n-grams of tokens that a text has at most once; 0 for no rule.
    no_repeat_scope : {"generated", "all"}
        Tokens whose n-grams are not repeated: generated ones only, or those of the prompt as well, as in transformers.
        The prompt of an encoder-decoder is not counted in either case.
    stop : tuple of str
        A text ends before the first of these strings. One that is a single token also ends a beam, as the end-of-text
        token does.
    batch_size : int
        Prompts per batch. It does not change the run's id.
    every : int
        Every how many evaluations texts are generated and the metrics computed, from the first one, and in the last
        one; 0 for the test only.

    Raises
    ------
    ValueError
        A field is invalid.

    Examples
    --------
    >>> from lorascope import Generation
    >>> Generation(num_beams=10, length_penalty=0.9, no_repeat_ngram=4).stop
    ('\n\n',)
    """

    max_new_tokens: int = 64
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0
    no_repeat_scope: str = "generated"
    stop: tuple[str, ...] = ("\n\n",)
    batch_size: int = 16
    every: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "batch_size", "no_repeat_ngram", "every"):
            require(self, name, "an integer", is_integer(getattr(self, name)))
        require_at_least(self, 1, "max_new_tokens", "num_beams", "batch_size")
        require_at_least(self, 0, "no_repeat_ngram", "every")
        is_finite = is_number(self.length_penalty) and math.isfinite(self.length_penalty)
        require(self, "length_penalty", "a finite number", is_finite)
        require_choice(self, "no_repeat_scope", SCOPES)
        is_sequence = isinstance(self.stop, list | tuple)
        is_valid = is_sequence and all(isinstance(text, str) and text for text in self.stop)
        require(self, "stop", "a tuple of non-empty strings", is_valid)
        object.__setattr__(self, "stop", tuple(self.stop))

    def is_due(self, evaluation: int, last: bool) -> bool:
        """Return whether an evaluation on the validation split, counted from 0, generates texts."""
        return self.every > 0 and (last or evaluation % self.every == 0)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without the batch size, on which texts do not depend."""
        values = asdict(self)
        del values["batch_size"]
        return values | {"length_penalty": float(self.length_penalty), "stop": list(self.stop)}


def read_generation(value: object) -> Generation:
    """Return the settings of a Generation, or of a table of its fields, as a sweep file or a run has it."""
    if isinstance(value, Generation):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"generation must be a Generation, a table of its fields or None, got {value!r}")
    names = [field.name for field in fields(Generation)]
    for name in value:
        if name not in names:
            raise ValueError(unknown_name("field of generation", name, names))
    return Generation(**value)


class NoRepeats(transformers.LogitsProcessor):
    """Rule that a text has each n-gram of tokens once, from the position in each row where it begins to count."""

    def __init__(self, size: int, starts: Int[np.ndarray, "rows"]) -> None:
        self.size, self.starts = size, starts

    def __call__(
        self, input_ids: Int[Tensor, "beams tokens"], scores: Float[Tensor, "beams vocabulary"]
    ) -> Float[Tensor, "beams vocabulary"]:
        """Set the scores of tokens that would repeat an n-gram to minus infinity."""
        scores = scores.clone()
        beams_per_row = len(input_ids) // len(self.starts)
        for beam, ids in enumerate(input_ids.tolist()):
            ids = ids[self.starts[beam // beams_per_row] :]
            before = ids[len(ids) - self.size + 1 :]
            for end in range(self.size - 1, len(ids)):
                if ids[end - self.size + 1 : end] == before:
                    scores[beam, ids[end]] = -math.inf
        return scores


def require_generation(model: nn.Module, task: Task) -> None:
    """Raise a ValueError unless a model generates open responses to the prompts of a task that fits its head."""
    cannot = f"cannot generate with {type(model).__name__}"
    if task.kind == "choice":
        raise ValueError(f"cannot generate for {task.name}: its answers are choices; omit generation")
    if task.kind not in ("prompt", "seq2seq", "lm"):
        raise ValueError(f"{cannot}: it has no language model head")
    if task.kind == "lm":
        raise ValueError(f"cannot generate for {task.name}: it needs the columns prompt and response")
    if task.labels:
        raise ValueError(f"cannot generate for {task.name}: its answers are classes; omit generation")


def group_references(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the items of a task's rows: ``prompt``, the list ``references`` of its responses, and ``group`` if any."""
    items = rows.assign(references=rows["response"].str.strip())
    return collect_references(items.drop(columns=set(rows) - {"prompt", "group"}))


def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    generation: Generation,
    max_length: int,
    device: str | torch.device = "cpu",
) -> list[str]:
    """Generate a text for each prompt without dropout, and restore the train or eval mode of the model.

    Prompts are tokenized as in training. For a causal language model, those that are longer than ``max_length`` tokens,
    or than the positions that the generated tokens leave, are truncated at the beginning. For an encoder-decoder, they
    are truncated at the end.

    Raises
    ------
    ValueError
        The model has too few positions for the generated tokens.
    """
    length = generation.max_new_tokens
    positions = models.count_positions(model)
    if length >= positions:
        raise ValueError(f"max_new_tokens must be below {positions}, the positions of the model, got {length}")
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    room = positions
    if not seq2seq:
        room -= length
    encoded = prompt_ids(tokenizer, list(prompts), int(min(max_length, room)), seq2seq=seq2seq)
    lengths = np.array(list(map(len, encoded)))
    # Stable, and by length, so that there is little padding.
    order = np.argsort(lengths, kind="stable")
    config = _generation_config(model, tokenizer, generation)
    texts = [""] * len(encoded)
    training = model.training
    model.eval()
    for start in range(0, len(order), generation.batch_size):
        rows = order[start : start + generation.batch_size]
        width = int(lengths[rows].max())
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for line, row in enumerate(rows):
            first = 0
            if not seq2seq:
                # Padding is on the left, because the generated tokens follow the last one.
                first = width - lengths[row]
            ids[line, first : first + lengths[row]] = torch.tensor(encoded[row])
            mask[line, first : first + lengths[row]] = 1
        before = width
        if seq2seq:
            before = 1  # the first token of the decoder
        processors = transformers.LogitsProcessorList()
        if generation.no_repeat_ngram:
            starts = np.full(len(rows), before)
            if generation.no_repeat_scope == "all":
                starts -= before if seq2seq else lengths[rows]
            processors.append(NoRepeats(generation.no_repeat_ngram, starts))
        with models.quiet():
            output = model.generate(  # type: ignore[operator]
                ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=processors,
            )
        for row, tokens in zip(rows, output[:, before:].tolist(), strict=True):
            texts[row] = _decode(tokenizer, tokens, generation.stop)
    model.train(training)
    return texts


def _generation_config(model: Any, tokenizer: Any, generation: Generation) -> transformers.GenerationConfig:
    """Return the settings of transformers, with a value for each that a checkpoint may set, except forced tokens."""
    ends = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for text in generation.stop:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id:
            ends += tokens
    return transformers.GenerationConfig(
        max_new_tokens=generation.max_new_tokens,
        num_beams=generation.num_beams,
        length_penalty=generation.length_penalty,
        early_stopping=False,
        do_sample=False,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        encoder_no_repeat_ngram_size=0,
        encoder_repetition_penalty=1.0,
        min_new_tokens=0,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )


def _decode(tokenizer: Any, tokens: list[int], stop: Sequence[str]) -> str:
    """Return the text before the first stop string, without special tokens."""
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for ending in stop:
        text = text.partition(ending)[0]
    return text.strip()
