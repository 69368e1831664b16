"""Processes that train one run together, each on its rows of the batch, as ``accelerate launch`` starts them.

Each process has the whole model and the same weights. It computes the gradients of its rows, weighted by their number,
and one sum over the processes gives all of them the gradients of the batch. Everything after that is the same in each
process: clipping, the method, the optimizer. Only the first process writes. With one process, nothing is done.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, distributed, nn

from lorascope.methods.field_checks import default_if_none
from lorascope.methods.method import Batch
from lorascope.runs.run import Run
from lorascope.runs.writer import RunWriter
from lorascope.schema.records import Item

T = TypeVar("T")

# Variables of torchrun and accelerate, without which processes do not find each other.
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def count_rows(batch: Batch) -> int:
    """Return the number of rows of a batch, whose labels have other names in question answering."""
    return len(next(iter(batch.values())))


@dataclass(frozen=True)
class Processes:
    """The processes of a training: the number of this one, how many there are, and the device of this one."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def local_rows(self, batch: Batch) -> Batch:
        """Return the rows of a batch that this process computes; there are none if it has fewer rows than processes."""
        if self.size == 1:
            return batch
        rows = count_rows(batch)
        start, stop = rows * self.rank // self.size, rows * (self.rank + 1) // self.size
        return {key: value[start:stop] for key, value in batch.items()}

    def local_starts(self, rows: int, batch_size: int) -> range:
        """Return the first rows of the batches that this process evaluates; all processes cover all rows."""
        return range(self.rank * batch_size, rows, self.size * batch_size)

    def sum_gradients(self, parameters: Iterable[nn.Parameter], loss: float) -> float:
        """Replace the gradients of all processes by their sum, and return the sum of the losses.

        A parameter has no gradient afterwards if it had none in any process.
        """
        if self.size == 1:
            return loss
        # Frozen parameters of the optimizer, such as LISA's blocks, have no gradient in any process.
        trained = list(filter(_is_trained, parameters))
        gradients: list[Tensor] = []
        numbers = [loss]
        for parameter in trained:
            gradient = parameter.grad
            numbers.append(float(gradient is not None))
            gradients.append(default_if_none(gradient, torch.zeros_like(parameter)))
        # Not in float64, which would double the size of all gradients.
        numbers_tensor = torch.tensor(numbers, dtype=torch.float32, device=self.device)
        if any(parameter.dtype == torch.float64 for parameter in trained):
            numbers_tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        *sums, totals = self._sum([*gradients, numbers_tensor])
        total_loss, *counts = totals.tolist()
        for parameter, gradient, count in zip(trained, sums, counts, strict=True):
            parameter.grad = gradient
            if not count:
                parameter.grad = None
        return total_loss

    def sum_tensors(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the sums of tensors over the processes, which have no graph; all must have the same names."""
        if self.size == 1:
            return tensors
        return dict(zip(tensors, self._sum([*tensors.values()]), strict=True))

    def sum_arrays(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the sums of arrays over the processes; they are exact if each entry is zero in all but one process."""
        if self.size == 1:
            return list(arrays)
        tensors = []
        for array in arrays:
            tensors.append(torch.from_numpy(array.astype(np.float64)).to(self.device))
        sums = []
        for total, array in zip(self._sum(tensors), arrays, strict=True):
            sums.append(total.cpu().numpy().astype(array.dtype))
        return sums

    def _sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum tensors over the processes by one flat all-reduce, in float32 or their widest dtype."""
        dtype = torch.float32
        for tensor in tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        flat = torch.cat([tensor.detach().flatten().to(dtype) for tensor in tensors])
        distributed.all_reduce(flat)
        sums, start = [], 0
        for tensor in tensors:
            total = flat[start : start + tensor.numel()]
            sums.append(total.view(tensor.shape).to(tensor.dtype))
            start += tensor.numel()
        return sums

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set in any process."""
        if self.size == 1:
            return flag
        count = torch.tensor([float(flag)], device=self.device)
        distributed.all_reduce(count)
        return bool(count.item())

    def call_first(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in the first process only, and return its result in every one, or raise its error there.

        The other processes wait for it.
        """
        if self.size == 1:
            return function(*arguments)
        outcome: list[Any] = [None, ""]
        failure: Exception | None = None
        if self.first:
            try:
                outcome[0] = function(*arguments)
            except Exception as error:  # the other processes would wait forever
                failure, outcome[1] = error, str(error) or type(error).__name__
        distributed.broadcast_object_list(outcome, src=0, device=torch.device(self.device))
        if failure is not None:
            raise failure
        if outcome[1]:
            raise ValueError(outcome[1])
        return outcome[0]

    def require_same(self, run_id: str) -> None:
        """Raise a ValueError unless all processes train the same run."""
        if self.size == 1:
            return
        ids: list[Any] = [None] * self.size
        distributed.all_gather_object(ids, run_id)
        if len(set(ids)) > 1:
            raise ValueError(
                f"the {self.size} processes must train one run, got {', '.join(sorted(set(ids)))}: pass the same "
                "model, data, method and settings in each, or start them without accelerate launch and torchrun"
            )

    def require_rows(self, batch_size: int, accumulate: int) -> None:
        """Raise a ValueError unless a batch has as many rows in each process and micro-batch."""
        if self.size > 1 and batch_size % (self.size * accumulate):
            divisor = f"{self.size} processes x accumulate {accumulate}"
            raise ValueError(f"batch_size must be divisible by {divisor}, got {batch_size}")

    @contextmanager
    def local_draws(self, seed: int, index: int) -> Iterator[None]:
        """Draw the dropout of a step from a generator of this process, and leave the common generator as it was.

        Rows of different processes have different masks, and the method draws the same numbers in every process.
        """
        with self.unchanged_draws():
            if self.size > 1:
                numbers = np.random.SeedSequence([seed, index, self.rank]).generate_state(1)
                torch.random.manual_seed(int(numbers[0]))
            yield

    @contextmanager
    def unchanged_draws(self) -> Iterator[None]:
        """Restore torch's generators after the context if there are several processes, which must draw the same."""
        if self.size == 1:
            yield
            return
        devices = []
        if torch.device(self.device).type == "cuda":
            devices.append(self.device)
        with torch.random.fork_rng(devices=devices):
            yield


SINGLE_PROCESS = Processes()


def _is_trained(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def launched_processes() -> int:
    """Return the number of processes in which this program was started, from the environment."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    if any(name not in os.environ for name in _VARIABLES):
        return 1
    return int(os.environ["WORLD_SIZE"])


def require_single(action: str) -> None:
    """Raise a ValueError if the program was started in several processes, which cannot do this together."""
    if (size := launched_processes()) > 1:
        raise ValueError(f"cannot {action} in {size} processes: start it in one, without accelerate launch or torchrun")


def join(device: str) -> Processes:
    """Join the processes in which this program was started, and return them; every one must call this.

    An accelerator without a number becomes that of this process.
    """
    size = launched_processes()
    if size == 1:
        return Processes(device=device)
    kind = torch.device(device)
    if kind.type != "cpu" and kind.index is None:
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
        if local >= count:
            raise ValueError(
                f"cannot start process {local + 1} of this machine: it has {count} devices; start at most {count} "
                "processes, or pass device"
            )
        device = f"{kind.type}:{local}"
    if kind.type != "cpu":
        torch.accelerator.set_device_index(torch.device(device).index)
    if not distributed.is_initialized():
        distributed.init_process_group()  # gloo for tensors on the CPU, NCCL for those on GPUs
        atexit.register(_leave)
    return Processes(distributed.get_rank(), size, device)


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


class SilentWriter(RunWriter):
    """Writer of the processes after the first: it writes nothing."""

    def begin(self, table: pd.DataFrame | None) -> None:
        """Create no folder."""

    def require_folder(self) -> None:
        """Accept that there is no folder of this writer."""

    def collect(self, step: int, items: Iterable[Item]) -> None:
        """Drop the records."""

    def finish(self, status: str) -> Run:
        """Return the run, which the first process writes."""
        return Run(self.path, self.meta)
