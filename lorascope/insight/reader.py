"""Reader of components: the words that each component of an update uses on rows of text, and what it writes.

A first pass over rows of the training split orders all components by their total contribution to the margin. Words are
measured on rows of the validation split; definitions, tests and verdicts are in ``lorascope.analysis.reading``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorascope.adapters.activation_patching import Batch, Move, moved_measures
from lorascope.adapters.delta import attach
from lorascope.adapters.hidden_states import evaluation_mode
from lorascope.analysis.component_blocks import ComponentBlock, component_blocks
from lorascope.analysis.paired_rows import estimate_rows
from lorascope.analysis.reading import (
    FEWEST_OCCURRENCES,
    FIRST_WORDS,
    Passage,
    ReadComponent,
    Reading,
    WordOccurrences,
    Written,
    reading_of_components,
    tabulate_words,
)
from lorascope.array_types import Bool, Float, Int
from lorascope.inputs import models
from lorascope.inputs.tasks import Task
from lorascope.inputs.text_rows import TextRows, encode_rows
from lorascope.insight.adapted_base import AdaptedBase, open_adapted
from lorascope.insight.instrument_costs import announce, reading_passes, time_passes
from lorascope.insight.measured_results import recall
from lorascope.insight.receipt_origin import origin_of
from lorascope.insight.token_contributions import MARKS, Margin, TracedCall, contribute, model_inputs, traced_calls
from lorascope.insight.token_words import TokenWords, find_words
from lorascope.insight.update_parts import PartDirections, ScaledUpdates, to_directions
from lorascope.runs.receipt import Receipt
from lorascope.runs.result import Result
from lorascope.training.settings import Settings

FEWEST_ROWS = 200
LARGEST_ROWS = 1000
DRAWS = 200
"""Random components with which each component is compared."""
_PASSAGES = 5
_PASSAGE_WORDS = 40  # of a longer row, those around the largest activation
_SAMPLE = 512  # inputs of a module from which their covariance is known


def read(
    run: Result,
    model: str | Path,
    rows: str | Path | Task,
    top: int = 8,
    *,
    state: str = "last",
    progress: bool = True,
) -> Reading:
    """Read which words the components of an update use, and what they make the model say.

    Parameters
    ----------
    run : Run or Adapter
        Run of an adapter method, or an adapter.
    model : str or path
        Its base model, a classifier or a causal language model; see ``ls.models.load``.
    rows : str, path or Task
        Rows to read; see ``ls.tasks.load``. At most 1000 rows of the training split order the components, and as many
        of the validation split measure their words.
    top : int
        Number of components, those with the largest total contribution; 8 by default. Components of one module whose
        singular values differ by less than 5% count as one, since their basis is arbitrary.
    state : {"last", "best"}
        Saved parameters.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Reading
        With ``card(number)``, ``table``, ``summary()`` and ``to_json()``.

    Raises
    ------
    ValueError
        The run has no adapter or an input-dependent one, the model is not its base, the rows have no text or there are
        fewer than 200, no word occurs five times, or ``top`` is below 1.
    """
    if top < 1:
        raise ValueError(f"top must be an integer >= 1, got {top}")
    adapted = open_adapted(run, model, rows, state)
    _require_text(adapted)
    content = {"model": str(model), "task": adapted.task.hash, "top": top, "state": state}
    return recall(
        "read", run, adapted, content, partial(_read, run, str(model), adapted, top, state, progress), progress
    )


def _read(run: Result, model: str, adapted: AdaptedBase, top: int, state: str, progress: bool) -> Reading:
    """Read the components of an update."""
    began = time.process_time()
    max_length = run.meta.settings.get("max_length", Settings.max_length)
    selection = encode_rows(adapted.base, adapted.task, "train", LARGEST_ROWS, max_length)
    measured = encode_rows(adapted.base, adapted.task, "validation", LARGEST_ROWS, max_length)
    words = find_words(models.tokenizer(adapted.base), _token_ids(measured))
    with evaluation_mode(adapted.base), tqdm(desc="read", unit="pass", disable=not progress, leave=False) as bar:
        margin = Margin(adapted.base, *measured)
        # What the base predicts is measured before its adapter is attached.
        base_margins = margin.values()
        attach(adapted.base, adapted.deltas)
        timed = time_passes(margin, ScaledUpdates(adapted.base, adapted.deltas, {}))
        rows = len(measured.table)
        announce("read", rows * timed.per_row(reading_passes(top, len(selection.table) / rows)), progress)
        occurrences = _count_occurrences(words, margin, margin.values() - base_margins)
        if not occurrences.testable().any():
            raise ValueError(
                f"cannot read on {adapted.task.name}: no word occurs {FEWEST_OCCURRENCES} times in the "
                f"{len(measured.table)} rows of its validation split"
            )
        bar.update()
        blocks = _largest_blocks(adapted, Margin(adapted.base, *selection), top)
        if not blocks:
            raise ValueError(f"cannot read {run.reference}: its update is zero")
        bar.update()
        reader = ComponentReader(margin, words, occurrences, [_to_component(adapted.base, block) for block in blocks])
        components = reader.components()
        bar.update()
        written = reader.written(components, _output_names(adapted))
    receipt = Receipt(
        run=run.id,
        base=model,
        rows={"selection": Margin(adapted.base, *selection).receipt, "reading": margin.receipt},
        call={"top": top, "draws": DRAWS, "state": state},
        **origin_of("read", run, model, adapted.task, top=top, state=state),
        seconds=time.process_time() - began,
    )
    return reading_of_components(run.label, components, written, reader.inputs, receipt)


def _require_text(adapted: AdaptedBase) -> None:
    task = adapted.task
    if task.kind == "image" or getattr(adapted.base.config, "is_encoder_decoder", False):
        kind = "images" if task.kind == "image" else "an encoder-decoder"
        raise ValueError(f"cannot read {task.name} with {kind}: words are read in a classifier or a causal LM of text")
    # Counted before encoding, which takes fewer rows.
    rows = int((task.table["split"] == "validation").sum())
    if rows < FEWEST_ROWS:
        raise ValueError(
            f"cannot read on {task.name}: words need at least {FEWEST_ROWS} rows, got {rows} of its validation split "
            "(a column split assigns rows)"
        )


def _token_ids(rows: TextRows) -> list[list[int]]:
    encoded: Any = rows.encoded
    return encoded.tokens["input_ids"]


def _count_occurrences(words: TokenWords, margin: Margin, gains: Float[np.ndarray, "row"]) -> WordOccurrences:
    """Return the occurrences of all words but special tokens."""
    mask = _are_words(words)
    # As objects, because the longest word would set the width of all.
    texts = np.array(words.texts, dtype=object)[mask]
    names, numbers = np.unique(texts.astype(str), return_inverse=True)
    return WordOccurrences(tuple(names.tolist()), numbers, words.row[mask], margin.counts, gains, margin.clusters)


def _are_words(words: TokenWords) -> Bool[np.ndarray, "occurrence"]:
    """Return which occurrences are words: no special tokens, and no line breaks."""
    return ~np.array(words.is_special) & np.array([text != "" for text in words.texts])


def _largest_blocks(adapted: AdaptedBase, margin: Margin, top: int) -> list[ComponentBlock]:
    """Return the blocks of components with the largest total contribution; the adapter is attached."""
    blocks, directions = [], {}
    for module in _token_modules(adapted, margin.batches[0]):
        module_blocks = component_blocks(module, adapted.updates[module])
        if module_blocks:
            arrays = zip(*(block[2:] for block in module_blocks), strict=True)
            directions[module] = to_directions(adapted.base, module, *(np.concatenate(a, -1) for a in arrays))
            blocks += module_blocks
    with ScaledUpdates(adapted.base, adapted.deltas, directions).gated(1.0) as gates:
        gradients = dict(zip(gates, margin.slopes(list(gates.values())), strict=True))
    totals = []
    # Gates of a module are in the order of its blocks.
    used = dict.fromkeys(directions, 0)
    for block in blocks:
        first = used[block.module]
        used[block.module] += len(block.sigma)
        totals.append(float(gradients[block.module][first : used[block.module]].sum()))
    # Signed: a component that lowers the margin has no words that it uses.
    order = np.argsort(-np.array(totals), kind="stable")
    return [blocks[index] for index in order[:top].tolist()]


def _token_modules(adapted: AdaptedBase, batch: Batch) -> list[str]:
    """Return the updated modules that take one vector per token: neither a pooler nor routed experts."""
    # Shapes do not depend on the rows, so one batch shows them.
    with torch.no_grad(), traced_calls(adapted.base, list(adapted.updates)) as calls:
        adapted.base(**model_inputs(batch))
    shape = batch["input_ids"].shape
    modules = []
    for module, module_calls in calls.items():
        if module_calls and all(call.inputs.shape[:2] == shape for call in module_calls):
            modules.append(module)
    return modules


class ReaderComponent(NamedTuple):
    """Component to read, and random components of the same module and singular values."""

    block: ComponentBlock
    directions: PartDirections
    random: PartDirections


def _to_component(model: nn.Module, block: ComponentBlock) -> ReaderComponent:
    # One seed, so that components of one module are compared with the same random directions.
    generator = np.random.default_rng(0)
    number = DRAWS * len(block.sigma)
    vectors = []
    for length in (len(block.U), len(block.V)):
        drawn_vectors = generator.standard_normal((length, number))
        vectors.append(drawn_vectors / np.linalg.norm(drawn_vectors, axis=0))
    random = to_directions(model, block.module, vectors[0], np.tile(block.sigma, DRAWS), vectors[1])
    return ReaderComponent(block, to_directions(model, block.module, *block[2:]), random)


@dataclass(eq=False)
class ComponentReader:
    """Adapted model with rows, on which some of its components are read.

    Parameters
    ----------
    margin : Margin
        Measure of the rows.
    words : TokenWords
        Words and special tokens of the same rows.
    occurrences : WordOccurrences
        Their words.
    targets : list of ReaderComponent
        Components to read.
    """

    margin: Margin
    words: TokenWords
    occurrences: WordOccurrences
    targets: list[ReaderComponent]

    def __post_init__(self) -> None:
        self.token_rows = self.words.row[self.words.occurrence]
        self.starts = np.searchsorted(self.token_rows, np.arange(len(self.margin.counts)))
        self.is_word = _are_words(self.words)
        self.testable = np.flatnonzero(self.occurrences.testable())
        self.modules = list(dict.fromkeys(component.block.module for component in self.targets))
        self.inputs: dict[str, Float[np.ndarray, "tokens in"]] = {}

    def components(self) -> list[ReadComponent]:
        """Measure every component at every token in one forward and backward pass over the rows."""
        number = len(self.targets)
        sizes, values = np.zeros((2, number, len(self.token_rows)))
        words = self._number_tokens(self.testable)
        sums = torch.zeros(number, len(self.testable), DRAWS, dtype=torch.float64)
        is_sampled = np.zeros(len(self.token_rows), bool)
        is_sampled[np.random.default_rng(0).permutation(len(is_sampled))[:_SAMPLE]] = True
        samples: dict[str, list[Tensor]] = {module: [] for module in self.modules}
        for tokens, calls in self._traced_batches():
            is_tested, is_input = words[tokens] >= 0, is_sampled[tokens]
            tested = torch.from_numpy(words[tokens][is_tested])
            for module, module_calls in calls.items():
                samples[module] += [call.inputs[is_input] for call in module_calls]
            for index, component in enumerate(self.targets):
                for x, gradient in calls[component.block.module]:
                    at_tokens = contribute(component.directions, x, gradient)
                    sizes[index, tokens] = at_tokens.activations.norm(dim=-1)
                    values[index, tokens] += at_tokens.contributions.sum(-1).numpy()
                    random = contribute(component.random, x[is_tested], gradient[is_tested]).contributions
                    # Random components are drawn in groups as large as the block.
                    sums[index].index_add_(0, tested, random.double().unflatten(-1, (DRAWS, -1)).sum(-1))
        for module, module_samples in samples.items():
            inputs = torch.cat(module_samples).numpy()
            if inputs.dtype.kind == "f":  # ids of an embedding have no covariance
                self.inputs[module] = inputs - inputs.mean(0)
        # Means are over occurrences, which may have several tokens.
        counts = np.bincount(self.occurrences.word)[self.testable]
        components = []
        for index, component in enumerate(self.targets):
            random_means = sums[index].numpy() / counts[:, None]
            components.append(self._read_component(component.block, sizes[index], values[index], random_means))
        return components

    def _traced_batches(self) -> Iterator[tuple[Int[np.ndarray, "token"], dict[str, list[TracedCall]]]]:
        """Yield the tokens of each batch, and the inputs of the modules at them with the gradients of their outputs."""
        for batch, mask, tokens in self._batches():
            with traced_calls(self.margin.model, self.modules) as calls:
                margin = self.margin.measure(batch).sum()
            shifts = [call.shift for module_calls in calls.values() for call in module_calls]
            # In the order of the shifts: all calls of the first module, then those of the next one.
            gradients = iter(torch.autograd.grad(margin, shifts))
            at_tokens = {}
            for module, module_calls in calls.items():
                at_tokens[module] = [TracedCall(call.inputs[mask], next(gradients)[mask]) for call in module_calls]
            yield tokens, at_tokens

    def _batches(self) -> Iterator[tuple[Batch, Tensor, Int[np.ndarray, "token"]]]:
        """Yield every batch, the mask of its tokens (rows, tokens), and their numbers."""
        for index, batch in enumerate(self.margin.batches):
            rows = self.margin.batched_rows[index]
            mask = batch["attention_mask"].bool()
            positions = self.starts[rows][:, None] + np.arange(mask.shape[1])
            yield batch, mask, positions[mask.numpy()]

    def _number_tokens(self, words: Int[np.ndarray, "words"]) -> Int[np.ndarray, "token"]:
        """Return the position of every token's word among some words; -1 for other tokens."""
        numbers = np.full(len(self.occurrences.words), -1)
        numbers[words] = np.arange(len(words))
        by_occurrence = np.full(len(self.words.texts), -1)
        by_occurrence[self.is_word] = numbers[self.occurrences.word]
        return by_occurrence[self.words.occurrence]

    def _read_component(
        self,
        block: ComponentBlock,
        sizes: Float[np.ndarray, "token"],
        values: Float[np.ndarray, "token"],
        random: Float[np.ndarray, "words draws"],
    ) -> ReadComponent:
        """Return the words and rows of a component from the sizes of its activations and its contributions."""
        totals = np.bincount(self.token_rows, values)
        total = estimate_rows(totals, self.occurrences.targets, self.occurrences.clusters)
        by_occurrence = np.bincount(self.words.occurrence, values)
        words = tabulate_words(self.occurrences, by_occurrence[self.is_word], random, self.testable)
        # Special tokens have the largest activations of many components.
        sizes = np.where(self.is_word[self.words.occurrence], sizes, 0)
        peaks = np.maximum.reduceat(sizes, self.starts)
        passages = []
        for row in np.argsort(-peaks, kind="stable")[:_PASSAGES].tolist():
            tokens = np.flatnonzero(self.token_rows == row)
            peak = self.words.occurrence[tokens[sizes[tokens].argmax()]]
            first, last = self.words.occurrence[tokens[[0, -1]]]
            # The window is moved inside the row if the peak is near an end.
            first = max(first, min(peak - _PASSAGE_WORDS // 2, last + 1 - _PASSAGE_WORDS))
            window = slice(first, min(first + _PASSAGE_WORDS, last + 1))
            passages.append(Passage(self.words.texts[window], by_occurrence[window].tolist()))
        return ReadComponent(block, total, words, tuple(passages))

    @torch.no_grad()
    def written(
        self, components: Sequence[ReadComponent], names: Callable[[int], str]
    ) -> dict[tuple[int, str], Written]:
        """Return what each component writes where its first words occur, by its number and the word.

        Outputs are the classes, or the next token of a language model. Each component is removed in its own pass.
        """
        # Only words that a verdict can name, because outputs of a language model are many.
        first_words = [component.words["word"].head(FIRST_WORDS).to_list() for component in components]
        distinct = sorted({word for words in first_words for word in words})
        numbers = np.searchsorted(self.occurrences.words, distinct)
        marks = self._number_tokens(numbers)
        # A language model continues after the last token of a word.
        marks[:-1][self.words.occurrence[:-1] == self.words.occurrence[1:]] = -1
        moves: dict[str, list[Move]] = {module: [] for module in self.modules}
        for component in self.targets:
            moves[component.block.module].append(partial(_remove, component.directions))
        # Differences of sums, because the logits of all words would not fit in memory.
        sums: Any = 0
        removed: dict[str, Any] = {module: 0 for module in self.modules}
        for batch, mask, tokens in self._batches():
            batch_marks = torch.full(mask.shape, -1)
            batch_marks[mask] = torch.from_numpy(marks[tokens])
            measure = partial(_sum_logits, self.margin.model, len(distinct))
            undisturbed, moved = moved_measures(self.margin.model, measure, batch | {MARKS: batch_marks}, moves)
            sums = sums + undisturbed
            for module, measures in moved.items():
                removed[module] = removed[module] + torch.stack(measures)
        counts = np.bincount(self.occurrences.word)[numbers]
        position = dict.fromkeys(self.modules, 0)
        written = {}
        for number, (component, words) in enumerate(zip(self.targets, first_words, strict=True), start=1):
            module = component.block.module
            effects = (sums - removed[module][position[module]]) / torch.from_numpy(counts)[:, None]
            # A constant added to all logits changes no probability.
            effects -= effects.mean(1, keepdim=True)
            position[module] += 1
            for word in words:
                effect, output = effects[distinct.index(word)].max(0)
                written[number, word] = Written(names(int(output)), float(effect))
        return written


def _remove(directions: PartDirections, x: Tensor, y: Tensor) -> Tensor:
    return y - directions.output(x, torch.ones_like(directions.size))


def _sum_logits(model: nn.Module, number: int, batch: Batch) -> Float[Tensor, "words outputs"]:
    """Return the sum of the logits of each marked word: of the row's classes, or of the token after it."""
    marks = batch[MARKS]
    rows, tokens = (marks >= 0).nonzero(as_tuple=True)
    logits = model(**model_inputs(batch)).logits
    values = logits[rows] if logits.ndim == 2 else logits[rows, tokens]
    return values.new_zeros(number, logits.shape[-1], dtype=torch.float64).index_add(
        0, marks[rows, tokens], values.double()
    )


def _output_names(adapted: AdaptedBase) -> Callable[[int], str]:
    """Return a function that names an output of the model: a class or a token."""
    if adapted.task.classifies:
        return adapted.task.labels.__getitem__
    # Tokens such as a line break are white space only.
    tokenizer = models.tokenizer(adapted.base)
    return lambda token: tokenizer.decode([token]).strip() or repr(tokenizer.decode([token]))
