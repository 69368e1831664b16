"""Measures of a model under many perturbations of one module's output, recomputing only what depends on it.

Modules that end before the perturbed one starts cannot depend on its output, so their outputs are replayed from an
unperturbed pass. The perturbations ("moves") of one module are applied to copies of the batch, which pass through the
rest of the model together. Nothing here depends on the architecture: only the ``forward`` of modules is replaced.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lorascope.schema import module_table

Batch = dict[str, Tensor]
Loss = Callable[[Batch], Tensor]
Measure = Callable[[Batch], Tensor]
Move = Callable[[Tensor, Tensor], Tensor]
Forward = Callable[..., Any]


class JointMove(NamedTuple):
    """Perturbation of several modules of one block at once: functions of their inputs that return their outputs."""

    outputs: Mapping[str, Callable[[Tensor], Tensor]]


# Maximum number of elements in the largest tensor when copies pass together. A CPU is slower if they exceed its cache
# (1.3 times for 8 copies of 32 x 32 tokens of width 128), and an accelerator is faster with large batches.
MOST_ELEMENTS = {"cpu": 2**19}
MOST_ELEMENTS_ELSEWHERE = 2**26


def moved_losses(
    model: nn.Module, loss: Loss, batch: Batch, moves: Mapping[str, Sequence[Move]]
) -> tuple[float, dict[str, list[float]]]:
    """Compute a model's loss, and its losses under each move of each module's output; see ``moved_measures``."""
    undisturbed, measures = moved_measures(model, loss, batch, moves)
    return float(undisturbed), {name: list(map(float, values)) for name, values in measures.items()}


def moved_measures(
    model: nn.Module, measure: Measure, batch: Batch, moves: Mapping[str, Sequence[Move | JointMove]]
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Compute a measure of a model, and with activations patched: under each move of each module's output.

    Call this without gradients, with the model in evaluation mode. ``measure`` calls the model on a batch (rows, ...)
    and returns its mean loss or one value per row. ``moves`` are functions by module name, which take the module's
    input and output and return its new output. Joint moves are by the name of any of their modules; those of one name
    have the same modules, all of them in its block. The batch may have further entries for the measure, if their first
    dimension is the rows.
    """
    table = module_table.describe(model)
    block_of: dict[nn.Module, nn.Module] = {}
    for name in table["module"][table["role"] == "block"]:
        _, *descendants = model.get_submodule(name).modules()
        block_of |= dict.fromkeys(descendants, model.get_submodule(name))
    _, *modules = model.modules()
    top = _record_calls(measure, batch, modules, stored=set(modules) - block_of.keys())
    replay = _Replay(measure, batch, top, _record_calls(measure, _resize_batch(batch), modules))
    measures: dict[str, list[Tensor]] = {name: [] for name in moves}
    moved_names = filter(moves.get, moves)
    # The outputs inside only one block at a time are in memory.
    for block, names in itertools.groupby(moved_names, lambda name: block_of.get(model.get_submodule(name))):
        recorded = top if block is None else replay.look_into(block)
        for name in names:
            if isinstance(moves[name][0], JointMove):
                measures[name] = replay.joint_measures(model, recorded, cast(Sequence[JointMove], moves[name]))
            else:
                single_moves = cast(Sequence[Move], moves[name])
                measures[name] = replay.measures(model.get_submodule(name), recorded, single_moves)
    return top.measured, measures


def _resize_batch(batch: Batch) -> Batch:
    """Return the batch with another number of rows, which shows where the rows are in each output's shape."""
    resized = {}
    for key, value in batch.items():
        resized[key] = value[:1] if len(value) > 1 else torch.cat([value, value])
    return resized


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a module, from ``start`` to ``end`` on the clock of its pass; ``first`` is its first argument."""

    module: nn.Module
    start: int
    end: int
    outermost: bool
    shapes: list[Any]
    form: Any
    first: Any
    leaves: list[Any]
    versions: list[int]


def _versions(leaves: Sequence[Any]) -> list[int]:
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]


@dataclass(frozen=True, eq=False)
class _Pass:
    """One forward pass: what it measured, and its module calls in the order of their ends."""

    measured: Tensor
    calls: list[_Call]

    def ended_before(self, time: int) -> list[_Call]:
        return [call for call in self.calls if call.end < time]

    def calls_of(self, module: nn.Module) -> list[_Call]:
        return [call for call in self.calls if call.module is module]

    def outermost(self) -> list[_Call]:
        """Return the calls made by the model itself."""
        return [call for call in self.calls if call.outermost]


def _record_calls(
    measure: Measure, batch: Batch, modules: Iterable[nn.Module], stored: Container[nn.Module] = ()
) -> _Pass:
    """Record every call of these modules in one pass, with the outputs of those in ``stored``."""
    calls: list[_Call] = []
    clock = itertools.count()
    depth = 0

    def watched(module: nn.Module) -> Forward:
        forward = module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            start, depth = next(clock), depth + 1
            output = forward(*args, **kwargs)
            depth -= 1
            leaves, form = tree_flatten(output)
            shapes = [getattr(leaf, "shape", None) for leaf in leaves]
            first = None
            if module in stored:
                first = _first_argument(args, kwargs)
            else:
                leaves = []
            # The model may overwrite an output in place, which changes the version of its tensor.
            versions = _versions([first, *leaves])
            calls.append(_Call(module, start, next(clock), depth == 0, shapes, form, first, leaves, versions))
            return output

        return call

    with replaced_forwards({module: watched(module) for module in modules}):
        return _Pass(measure(batch), calls)


def _first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return next(iter((*args, *kwargs.values())), None)


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Replace the ``forward`` of modules in this context."""
    replaced = {}
    for module, forward in forwards.items():
        # Usually None, because ``forward`` is an attribute of the class.
        replaced[module] = vars(module).get("forward")
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, forward_before in replaced.items():
            if forward_before is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward_before


class _Replay:
    """Passes that start at a module, with all earlier outputs replayed.

    ``top`` is a pass over the batch with the outputs of all blocks and of the modules outside blocks, and ``resized`` a
    pass over another number of rows.
    """

    def __init__(self, measure: Measure, batch: Batch, top: _Pass, resized: _Pass) -> None:
        self.measure, self.batch, self.top = measure, batch, top
        # Modules that are called more than once are not replayed: which call is next depends on the skipped modules.
        self.by_row: dict[nn.Module, list[list[bool] | None]] = {}
        largest = 1
        for call, other in zip(top.calls, resized.calls, strict=True):
            self.by_row.setdefault(call.module, []).append(_is_batched(call.shapes, other.shapes))
            for shape in call.shapes:
                if shape is not None:
                    largest = max(largest, math.prod(shape))
        device = next(iter(batch.values())).device.type
        self.max_copies = max(1, MOST_ELEMENTS.get(device, MOST_ELEMENTS_ELSEWHERE) // largest)

    def look_into(self, block: nn.Module) -> _Pass:
        """Return a pass with all outputs inside the block, which replays the other blocks."""
        calls = self.top.calls_of(block)
        if len(calls) != 1:  # a block that is called several times cannot be replayed
            return self.top
        outside = [call for call in self.top.calls if call.end < calls[0].start or call.start > calls[0].end]
        modules = set(block.modules())
        with replaced_forwards(self._replay_forwards(outside, 1)):
            return _record_calls(self.measure, self.batch, modules, modules)

    def measures(self, module: nn.Module, recorded: _Pass, moves: Sequence[Move]) -> list[Tensor]:
        """Compute the measure for each move of a module; ``recorded`` has the outputs of the modules around it."""
        calls = recorded.calls_of(module)
        if not calls:  # a module that is not called does not affect the measure
            return [self.top.measured] * len(moves)
        # Each pass has its own clock, so a call of one is never compared with a call of the other.
        start = min(map(attrgetter("start"), self.top.calls_of(module)))
        before = self.top.ended_before(start) + recorded.ended_before(calls[0].start)
        copies = 1
        # Only outputs whose first dimension is the rows can be split into copies.
        if all(flags == [True] for flags in self.by_row[module]):
            copies = self.max_copies
        measures = []
        for start in range(0, len(moves), copies):
            chunk = moves[start : start + copies]
            forwards = self._replay_forwards(before, len(chunk))
            only_call = None
            # Checked for every chunk, because a pass may overwrite the stored output.
            if self._is_only_call(calls[0]):
                only_call = calls[0]
            forwards[module] = _patch_forward(module, only_call, chunk)
            with replaced_forwards(forwards):
                measures += self._measure_copies(len(chunk))
        return measures

    def joint_measures(self, model: nn.Module, recorded: _Pass, moves: Sequence[JointMove]) -> list[Tensor]:
        """Compute the measure for each joint move; only what precedes all of its modules is replayed."""
        hosts = {name: model.get_submodule(name) for name in moves[0].outputs}
        called = {name: host for name, host in hosts.items() if self.top.calls_of(host)}
        if not called:
            return [self.top.measured] * len(moves)
        before: list[_Call] = []
        # As in ``measures``, each pass has its own clock.
        for record in dict.fromkeys((self.top, recorded)):
            starts = [call.start for host in called.values() for call in record.calls_of(host)]
            before += record.ended_before(min(starts))
        copies = 1
        if all(flags == [True] for host in called.values() for flags in self.by_row[host]):
            copies = self.max_copies
        measures = []
        for first in range(0, len(moves), copies):
            chunk = moves[first : first + copies]
            forwards = self._replay_forwards(before, len(chunk))
            # The inputs of later modules follow from the moved outputs of earlier ones, so none is recorded.
            for name, host in called.items():
                forwards[host] = partial(_move_copies, [move.outputs[name] for move in chunk])
            with replaced_forwards(forwards):
                measures += self._measure_copies(len(chunk))
        return measures

    def _is_only_call(self, call: _Call) -> bool:
        """Return whether this is the module's only call, and its stored output was not overwritten since."""
        intact = bool(call.leaves) and call.versions == _versions([call.first, *call.leaves])
        return intact and len(self.by_row[call.module]) == 1

    def _replay_forwards(self, calls: Sequence[_Call], copies: int) -> dict[nn.Module, Forward]:
        """Return forwards that replay the outputs of these calls, for a number of copies of the batch."""
        forwards: dict[nn.Module, Forward] = {}
        for call in filter(self._is_only_call, calls):
            (by_row,) = self.by_row[call.module]
            if by_row is not None:
                forwards[call.module] = partial(_replay_output, call, by_row, copies)
        return forwards

    def _measure_copies(self, copies: int) -> list[Tensor]:
        """Call the model's direct children once for all copies, then measure each copy from their outputs."""
        if copies == 1:
            return [self.measure(self.batch)]
        single_calls = self.top.outermost()
        modules = set(map(attrgetter("module"), single_calls))
        stacked = {key: _repeat_rows(value, copies) for key, value in self.batch.items()}
        stacked_calls = _record_calls(self.measure, stacked, modules, modules).outermost()
        measures = []
        for copy in range(copies):
            outputs: dict[nn.Module, list[Any]] = {}
            for call, single in zip(stacked_calls, single_calls, strict=True):
                outputs.setdefault(call.module, []).append(_select_copy(call, single.shapes, copy))
            with replaced_forwards({module: _give_next(values) for module, values in outputs.items()}):
                measures.append(self.measure(self.batch))
        return measures


def _is_batched(shapes: Sequence[Any], other_shapes: Sequence[Any]) -> list[bool] | None:
    """Return whether each output has the rows as its first dimension; None if they are along another one."""
    flags = []
    for shape, other_shape in zip(shapes, other_shapes, strict=True):
        if shape is not None and shape[1:] != other_shape[1:]:
            return None
        flags.append(shape != other_shape)
    return flags


def _repeat_rows(tensor: Tensor, copies: int) -> Tensor:
    return tensor.repeat(copies, *[1] * (tensor.ndim - 1))


def _replay_output(call: _Call, by_row: Sequence[bool], copies: int, *args: Any, **kwargs: Any) -> Any:
    """Return the output of a call, for copies of the batch."""
    leaves = []
    for leaf, is_batched in zip(call.leaves, by_row, strict=True):
        if is_batched:
            leaf = _repeat_rows(leaf, copies)
        leaves.append(leaf)
    return tree_unflatten(leaves, call.form)


def _select_copy(call: _Call, shapes: Sequence[Any], copy: int) -> Any:
    """Return one copy's part of the output of a joint call; ``shapes`` are the shapes for a single copy."""
    leaves = []
    for leaf, shape in zip(call.leaves, shapes, strict=True):
        if shape is not None and leaf.shape != shape:  # all copies share an output of the same shape
            leaf = leaf.narrow(0, copy * shape[0], shape[0])
        leaves.append(leaf)
    return tree_unflatten(leaves, call.form)


def _move_copies(outputs: Sequence[Callable[[Tensor], Tensor]], *args: Any, **kwargs: Any) -> Tensor:
    """Return the outputs of a module for copies of the batch, each by its function."""
    inputs = _first_argument(args, kwargs).chunk(len(outputs))
    return torch.cat([output(x) for output, x in zip(outputs, inputs, strict=True)])


def _give_next(outputs: Sequence[Any]) -> Forward:
    remaining = iter(outputs)
    return lambda *args, **kwargs: next(remaining)


def _patch_forward(module: nn.Module, recorded: _Call | None, moves: Sequence[Move]) -> Forward:
    """Return a forward that applies one move to the output of each copy of the batch, which may be recorded."""
    forward = module.forward

    def call(*args: Any, **kwargs: Any) -> Tensor:
        if recorded is not None:
            return torch.cat([move(recorded.first, recorded.leaves[0]) for move in moves])
        x, y = _first_argument(args, kwargs), forward(*args, **kwargs)
        copies = zip(moves, x.chunk(len(moves)), y.chunk(len(moves)), strict=True)
        return torch.cat([move(x_copy, y_copy) for move, x_copy, y_copy in copies])

    return call
