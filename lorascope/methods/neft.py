r"""NeFT: full fine-tuning finds the neurons that rotate most, and only these train, again from the original model.

1. Tune: full fine-tuning of :math:`W_\text{org}` gives :math:`W_\text{ft}`.
2. Select the k neurons with the smallest S, over all layers and both projections. A neuron is a row of the up
   projection or a column of the down projection:

   .. math::

       S(n) = \frac{\langle w_\text{org}, w_\text{ft} \rangle}{\|w_\text{org}\| \, \|w_\text{ft}\|}

3. Train from :math:`W_\text{org}` again with masked gradients, where m is 1 on the selected neurons, else 0:

   .. math::

       \nabla W \leftarrow m \odot \nabla W

No module is added: the result is the model itself, in which k weight vectors differ.

===================  ==================================================================
paper                here
===================  ==================================================================
x (of NeFT_x%)       ``parameter_share``, of all parameters of the model
k                    ``num_neurons``, else k = round(``parameter_share`` * parameters / d)
S                    1 - ``selection_cosine``
M_org, M_ft          W_0, ``reference``
Reversed_x%          ``select_by`` "reversed"
NeFT+Reversed_x%     ``reversed_share``
===================  ==================================================================

In a preliminary experiment (section 3) the paper selects neurons by linear probes: ``select_by="probed"`` selects those
whose weights are most similar to the directions in which linear probes separate the classes. See
``methods.neft_probing``.

Source: NeFT (arXiv 2403.11621), equation 1, algorithm 1, section 4.2; section 3 for probing, figure 3 for the union of
both ends.

Departs:

- Exactly k neurons are selected, with ties broken by position (``neurons.rank_neurons``). The authors' code selects
  neurons strictly below the k-th score, k - 1 or fewer.
- 1 - S is computed from the difference of the vectors, in float64.
- Gradients are clipped after the mask. The code clips before it, so discarded gradients affect the scale
  (``clip_before``).
- With weight decay, which the paper does not use, selected neurons decay and the others are restored.
- A new classifier head trains as well.
- "random" is an additional control, which needs no reference run.
- ``clip_before`` uses the gradients of the head and of projections with a selected neuron; the code uses all
  projections.

Cost: the time of full fine-tuning plus that of the masked run. Memory is not saved: gradients and AdamW's moments have
the size of all projections with a selected neuron.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lorascope.adapters.host_weights import host_weight, orient_weight, to_array
from lorascope.analysis import neurons, selected_neurons
from lorascope.array_types import Bool
from lorascope.inputs.classifier_head import weights_hash
from lorascope.methods.field_checks import default_if_none, require, require_integer, require_literals
from lorascope.methods.full import Full
from lorascope.methods.method import Method, Phase, Step, added_later, task_head, trained_parameters
from lorascope.methods.neft_probing import PROBE_COSINE, Probing, probe_scores
from lorascope.runs import loading
from lorascope.runs.layout import Lazy
from lorascope.runs.result import Result
from lorascope.runs.run import Run
from lorascope.schema import module_table
from lorascope.schema.records import Quantity, Record, register

_NORM = "norm of all trained gradients before the mask"
_AFTER = "cosine distance by which neurons were selected"
_DISTANCE = "cosine distance of a neuron's weights from those in W₀"
register(
    "train with observe=[ls.observe.neurons()], or NeFT",
    neuron_cosine=Quantity("1 − cos", "", "neuron", "mean", _DISTANCE, "NeFT, eq. 1"),
)
register(
    "train NeFT",
    "NeFT, eq. 1",
    selected=Quantity("selected neurons", "", "neuron", "sum", "1 for each neuron that trains"),
    selection_cosine=Quantity("1 − cos after tuning", "", "neuron", "mean", _AFTER),
    leak=Quantity("change of frozen weights", definition="largest change of a masked weight"),
    unmasked_norm=Quantity("gradient norm before the mask", pool="norm", definition=_NORM),
)


@dataclass(kw_only=True)
class NeFT(Method, name="neft"):
    """Training of the neurons that full fine-tuning rotates most, from the original model.

    Parameters
    ----------
    num_neurons : int or None
        Number of neurons that train; None derives it from ``parameter_share``.
    parameter_share : float
        Fraction of the model's parameters that train if ``num_neurons`` is None.
    targets : str or tuple of str
        Roles whose neurons are candidates: rows of ``ffn_in`` and ``ffn_gate``, columns of ``ffn_out``.
    select_by : {"changed", "reversed", "random", "probed"}
        Rule, see ``neurons.select_neurons``; "reversed" and "random" are controls, "probed" uses linear probes.
    reference : Run or path, optional
        Finished run of full fine-tuning of the same model, or of linear probing; None trains it as a first phase.
    neurons : mapping module name -> sequence or array of int, optional
        Neurons to train instead: outputs of ``ffn_in`` or ``ffn_gate`` modules, inputs of ``ffn_out`` modules.
    tune_steps : int or None
        Steps of full fine-tuning, or batches for the linear probes; None uses the steps of ``train``.
    tune_lr : float or None
        Learning rate of full fine-tuning, which ``train(lr=)`` does not override; None uses ``lr``.
    clip_before : float or None
        Maximum norm of all trained gradients before they are masked; None disables this clipping.
    reversed_share : float
        Fraction of the model's parameters that train in addition to ``parameter_share`` (or ``num_neurons``), in the
        neurons with the lowest scores: 0.03 and 0.06 are together as many neurons as ``parameter_share=0.09``.
    """

    num_neurons: int | None = None
    parameter_share: float = 0.09
    targets: str | tuple[str, ...] = neurons.DEFAULT
    select_by: Literal["changed", "reversed", "random", "probed"] = "changed"
    reference: Run | Mapping[str, str] | str | Path | None = None
    neurons: Mapping[str, Collection[Any]] | None = None
    tune_steps: int | None = None
    tune_lr: float | None = None
    clip_before: float | None = None
    reversed_share: float = field(default=0.0, metadata=added_later())
    lr: float = 2e-5
    head_lr: float = 1e-4

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            self.targets = (self.targets,)
        require_literals(self)
        for role in self.targets:
            if role not in neurons.ROLES:
                raise ValueError(f"targets must be among {', '.join(map(repr, neurons.ROLES))}, got {role!r}")
        require_integer(self, 1, "num_neurons", "tune_steps")
        require(self, "parameter_share", "in (0, 1]", 0 < self.parameter_share <= 1)
        require(self, "reversed_share", "in [0, 1]", 0 <= self.reversed_share <= 1)
        valid = self.select_by in ("changed", "probed") or not self.reversed_share
        require(self, "reversed_share", f"0 with select_by={self.select_by!r}", valid)
        require(self, "clip_before", "> 0 or None", self.clip_before is None or self.clip_before > 0)
        if self.neurons is not None:
            self.neurons = neurons.to_plain_ints(self.neurons)
        if isinstance(self.reference, Result):
            self._check_reference(self.reference)
        self.neurons_: dict[str, list[int]] = {}

    @classmethod
    def example(cls) -> NeFT:
        return cls(num_neurons=24, lr=1e-2)

    @property
    def score_names(self) -> tuple[str, str]:
        """Column of the scores by which neurons are selected, and the quantity that records it."""
        return (PROBE_COSINE, PROBE_COSINE) if self.select_by == "probed" else ("cosine_distance", "selection_cosine")

    def prepare(self) -> None:
        """Load ``reference`` if it is a folder."""
        if isinstance(self.reference, str | Path):
            self.reference = self._check_reference(loading.load(self.reference))

    def _check_reference(self, reference: Result) -> Run:
        """Return the reference; raise a ValueError if it is an adapter, of the wrong kind, or trained a few neurons."""
        name, by_probes = reference.meta.method["name"], self.select_by == "probed"
        is_probing = name == Probing.name
        if not isinstance(reference, Run):
            reason = "it is an external adapter, whose initial weights are unknown. Use a run of ls.train"
        elif reference.meta.w0_hash is None:
            reason = "it is a run of a Trainer, whose initial weights are unknown. Use a run of ls.train"
        elif name == NeFT.name:
            first_phase, usable = (Probing, "linear probing") if by_probes else (Full, "full fine-tuning")
            usable = f"a run of {usable}"
            for run in reference.parents:
                if run.meta.method["name"] == first_phase.name and run.path:
                    usable = f"the phase before it, {run.path.resolve()}"
            reason = f"it trained only {len(selected_neurons.list_selected(reference)):,} neurons. Use {usable}"
        elif is_probing == by_probes:
            return reference
        elif by_probes:
            reason = "it is not a run of linear probing. Use one, or None"
        else:
            reason = "it is a run of linear probing. Use a run of full fine-tuning"
        source = f"{reference.id} ({reference.label})"
        raise ValueError(f"cannot select neurons by {self.select_by!r} from {source}: {reason}")

    def phases(self, base: Mapping[str, Tensor]) -> Generator[Phase, Run, None]:
        """Yield full fine-tuning or linear probing, if the selection needs it, then training of the neurons."""
        if self.neurons is not None or self.reference is not None or self.select_by == "random":
            yield Phase(self)
            return
        if self.select_by == "probed":
            probing = Probing(targets=tuple(self.targets), head_lr=self.head_lr)
            reference = yield Phase(probing, "probe", steps=self.tune_steps)
        else:
            full = Full(lr=default_if_none(self.tune_lr, self.lr), head_lr=self.head_lr)
            reference = yield Phase(full, "tune", steps=self.tune_steps, lr=self.tune_lr)
        # Every phase starts from W_org: only the positions of the neurons remain of the first one.
        yield Phase(replace(self, reference=reference), "masked")

    def trainer_problem(self) -> str:
        """Return that neurons must be given: selecting them takes another phase, or the run's seed."""
        if self.neurons is not None:
            return ""
        return f"neurons of {type(self).__name__} must be set under a Trainer, got None: pass neurons="

    def describe(self) -> dict[str, Any]:
        """Return the common facts, the candidate roles, and the quantity by which neurons were selected."""
        is_scored = self.neurons is None and self.select_by != "random"
        score = self.score_names[1] if is_scored else None
        return super().describe() | {"neuron_roles": list(self.targets), "selection_score": score}

    def attach(self, model: nn.Module) -> None:
        """Select the neurons; leave their projections and the task's head trainable."""
        self.prepare()
        self._groups = neurons.list_groups(module_table.describe(model), self.targets)
        # A method from a run folder has only the id of its reference; its neurons are state.
        run = self.reference if isinstance(self.reference, Run) else None
        if run and weights_hash(model) != run.meta.w0_hash:
            raise ValueError(f"reference must start from the weights of this model, got run {run.id} of another one")
        self._scores = self._score_neurons(model, run)
        self.neurons_ = self._choose(sum(parameter.numel() for parameter in model.parameters()))
        model.requires_grad_(False)
        for parameter in task_head(model).values():
            parameter.requires_grad_(True)
        axes = {group.module: group.axis for group in self._groups}
        self._masks: dict[str, Mask] = {}
        for module, numbers in self.neurons_.items():
            mask = self._masks[module] = Mask.of(model, module, axes[module], numbers)
            mask.weight.requires_grad_(True)

    def _score_neurons(self, model: nn.Module, reference: Run | None) -> pd.DataFrame | None:
        """Score every neuron from W_0, the weights of the model, to the reference; None if the scores are not known.

        The table has the columns ``neurons.COLUMNS``.
        """
        if reference is None:
            return neurons.unscored_neurons(self._groups) if self.select_by == "random" else None
        if self.select_by == "probed":
            return probe_scores(reference, self._groups)
        arrays = reference.tensors()
        for group in self._groups:
            if f"{group.module}.weight" not in arrays:
                reason = f"run {reference.id} ({reference.label}) did not train it. Use a run of full fine-tuning"
                raise ValueError(f"cannot score the neurons of {group.module}: {reason}")
        # Arrays of the reference become tensors one at a time, when they are compared.
        after = Lazy(list(arrays), lambda name: torch.from_numpy(np.array(arrays[name])))
        return distances(model, self._groups, dict(model.named_parameters()), after)

    def _choose(self, total: int) -> dict[str, list[int]]:
        """Select neurons by module; the result is empty for a method from a run folder, whose state contains them."""
        if self.neurons is not None:
            return neurons.check_neurons(self.neurons, self._groups)
        if self._scores is None:
            return {}
        # Neurons of different projections may differ in length; fractions use their mean length.
        weights = sum(group.count * group.width for group in self._groups)
        width = weights / sum(group.count for group in self._groups)

        def check(name: str, count: int, free: int) -> int:
            require(self, name, f">= {width / total:.2g}, the fraction of one neuron", count >= 1)
            if count > free:
                maximum = f"{free * width / total:.2g}, the fraction of {free:,} available neurons"
                raise ValueError(f"{name} must be <= {maximum}, got {getattr(self, name)} ({count:,} neurons)")
            return count

        column, _ = self.score_names
        free = int(self._scores[column].notna().sum())
        k = self.num_neurons or check(
            "parameter_share", neurons.count_for_share(self.parameter_share, total, width), free
        )
        mode = "changed" if self.select_by == "probed" else self.select_by  # both select the highest scores
        seed = int(torch.randint(2**31, ())) if mode == "random" else 0  # depends on the run's seed
        selected = neurons.select_neurons(self._scores, k, mode, seed, column)
        if self.reversed_share:
            # The sum is rounded, so that both ends together have as many neurons as one end with that sum.
            share = k * width / total if self.num_neurons else self.parameter_share
            number = neurons.count_for_share(share + self.reversed_share, total, width) - k
            check("reversed_share", number, free - k)
            selected = pd.concat([selected, neurons.select_neurons(self._scores, number, "reversed", by=column)])
        return neurons.neurons_by_module(selected)

    def after_backward(self, step: Step) -> None:
        """Mask the gradients, once they include the whole batch."""
        trained = trained_parameters(step.optimizer)
        self._unmasked = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if self.clip_before is not None:
            # A norm before the mask, as in the authors' code: discarded gradients affect the scale.
            torch.nn.utils.clip_grads_with_norm_(trained, self.clip_before, self._unmasked)
        for mask in self._masks.values():
            if mask.weight.grad is not None:
                mask.weight.grad.masked_fill_(mask.frozen, 0.0)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Restore the frozen weights, which weight decay changes without a gradient."""
        if any(group["weight_decay"] for group in step.optimizer.param_groups):
            for module, mask in self._masks.items():
                mask.weight.copy_(torch.where(mask.frozen, step.base[f"{module}.weight"], mask.weight))

    def frozen_entry_count(self) -> int:
        """Return the number of weights that the masks freeze."""
        return sum(mask.covered for mask in self._masks.values())

    def records(self, step: Step) -> Iterable[Record]:
        """Yield the selected neurons and their scores at the start; at the end all cosine distances and the leak."""
        if step.finished == 0:
            for module, numbers in self.neurons_.items():
                yield Record("selected", np.ones(len(numbers)), module, np.array(numbers))
            if self._scores is not None and isinstance(self.reference, Run):
                column, quantity = self.score_names
                yield from _score_records(quantity, self._scores, column)
        else:
            yield Record("unmasked_norm", float(self._unmasked))
        if step.last:
            change = distances(step.model, self._groups, step.base, dict(step.model.named_parameters()))
            yield from _score_records("neuron_cosine", change, "cosine_distance")
            for module, mask in self._masks.items():
                leak = (mask.weight.detach() - step.base[f"{module}.weight"]).abs()
                yield Record("leak", float(leak.masked_fill(~mask.frozen, 0.0).max()), module)


class Mask(NamedTuple):
    """NeFT's mask of one module, which freezes all neurons except the selected ones.

    ``frozen`` has the layout of the stored weight with one entry per neuron, and broadcasts along their vectors.
    """

    weight: nn.Parameter
    frozen: Bool[Tensor, "rows columns"]

    @classmethod
    def of(cls, model: nn.Module, module: str, axis: int, numbers: Sequence[int]) -> Mask:
        """Build the mask of a module whose neurons' vectors run along ``axis`` of its weight (out, in)."""
        host: Any = model.get_submodule(module)
        weight = host_weight(host)
        frozen = torch.ones(weight.shape[1 - axis], dtype=torch.bool, device=weight.device)
        frozen[torch.tensor(numbers)] = False
        return cls(host.weight, orient_weight(host, frozen.unsqueeze(axis)))

    @property
    def covered(self) -> int:
        """Number of frozen weights."""
        return int(self.frozen.sum()) * self.weight.numel() // self.frozen.numel()


def distances(
    model: nn.Module, groups: Sequence[neurons.NeuronGroup], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> pd.DataFrame:
    """Compute NeFT's cosine distance of every neuron, with its norms, between two states of a model."""
    tables = []
    for group in groups:
        host, name = model.get_submodule(group.module), f"{group.module}.weight"
        original, tuned = (to_array(orient_weight(host, weights[name])) for weights in (before, after))
        tables.append(neurons.score_neurons(group, original, tuned))
    return pd.concat(tables, ignore_index=True)


def _score_records(quantity: str, scores: pd.DataFrame, column: str) -> Iterator[Record]:
    """Yield the scores in a column of the table of neurons, by module."""
    for module, rows in scores.groupby("module", sort=False):
        yield Record(quantity, rows[column].to_numpy(), str(module), rows["neuron"].to_numpy())
