"""NeFT: full fine-tuning says which neurons turn most; they alone train, again from the original model.

    tune     W_ft := full fine-tuning of W_org
    select   S(n) = <w_org, w_ft> / (|w_org| |w_ft|)   of every neuron n: a row of up, a column of down
             chosen: the k neurons with the smallest S, over all layers and both projections together
    masked   W := W_org again, and at each step   grad W := mask * grad W,   mask 1 on the chosen neurons, else 0

No module is added: what comes out is the model itself, in which k vectors of weights differ.

===================  ==================================================================
paper                here
===================  ==================================================================
x (of NeFT_x%)       ``parameter_share``, of all parameters of the model
k                    ``num_neurons``; else that of the share, k = round(share * parameters / d)
S                    1 - ``selection_cosine``
M_org, M_ft          W_0, ``reference``
Reversed_x%          ``select_by`` "reversed"
NeFT+Reversed_x%     ``reversed_share``
===================  ==================================================================

Before this the paper chose neurons by probing (section 3): ``select_by="probed"`` takes those whose weights are most
like the directions by which linear probes tell the classes apart, see ``methods.neft_probing``.

Source: NeFT (arXiv 2403.11621), equation 1, algorithm 1, section 4.2; section 3 for probing, figure 3 for the union of
both ends.

Departs: exactly k neurons, ties broken by place (``neurons.rank_neurons``); the authors' code keeps what lies strictly
below the k-th score, k - 1 or fewer. 1 - S is formed from the difference of the vectors, in float64. Gradients are
clipped after the mask; the code clips before, so that what is thrown away sets the scale (``clip_before``). With weight
decay, which the paper does not use, chosen neurons decay and the others are put back. A task's new head trains as well.
"random" is a control of ours and needs no tuned model. Also:

- ``clip_before`` uses the gradients of the head and of projections with a chosen neuron; the code uses all projections.

Cost: the time is full fine-tuning's and the masked run's together, and memory is not saved: gradients and AdamW's
moments are as large as the whole projections that hold a chosen neuron.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from lorascope.adapters.host_weights import host_weight, orient_weight, to_array
from lorascope.analysis import neurons, selected_neurons
from lorascope.inputs.classifier_head import weights_hash
from lorascope.methods.base import Method, Phase, Step, added_later, task_head
from lorascope.methods.full import Full
from lorascope.methods.neft_probing import PROBE_COSINE, Probing, probe_scores
from lorascope.runs import loading
from lorascope.runs.layout import Lazy
from lorascope.runs.run import Run
from lorascope.schema import module_table
from lorascope.schema.deprecation import accept_old_fields, formerly
from lorascope.schema.records import Quantity, Record, register

_SOURCE = "NeFT, eq. 1"
for _name, _quantity in {
    "selected": Quantity("selected neurons", "", "neuron", "sum", "1 for each neuron that trains", _SOURCE),
    "neuron_cosine": Quantity(
        "1 − cos", "", "neuron", "mean", "cosine distance of a neuron's weights from those in W_0", _SOURCE
    ),
    "selection_cosine": Quantity(
        "1 − cos after tuning", "", "neuron", "mean", "the cosine distance that neurons were chosen by", _SOURCE
    ),
    "leak": Quantity("leak", "", "none", "mean", "largest change of a weight that the mask holds still", _SOURCE),
    "unmasked_norm": Quantity(
        "gradient norm before the mask", "", "none", "norm", "norm of all trained gradients before the mask", _SOURCE
    ),
}.items():
    register(_name, _quantity)
MODES = (*neurons.MODES, "probed")


@accept_old_fields
@dataclass(kw_only=True)
class NeFT(Method, name="neft"):
    """Train the neurons that full fine-tuning turns most, from the original model.

    Parameters
    ----------
    num_neurons : int or None
        Neurons that train. None takes those of ``parameter_share``.
    parameter_share : float
        Share of the model's parameters that train, where ``num_neurons`` is not given.
    targets : tuple of str
        Roles that neurons are chosen from: ``ffn_in`` and ``ffn_gate`` have them as rows, ``ffn_out`` as columns.
    select_by : {"changed", "reversed", "random", "probed"}
        Which neurons, see ``neurons.select``; the second and third are controls, the last is by linear probes.
    reference : Run or path, optional
        A finished run of full fine-tuning of the same model, or of probing. None makes one, as a phase before.
    neurons : mapping module name -> sequence or array of int, optional
        Neurons chosen elsewhere: outputs of a module of ``ffn_in`` or ``ffn_gate``, inputs of one of ``ffn_out``.
    tune_steps : int or None
        Steps of the full fine-tuning, or batches that are probed; None takes the steps of ``train``.
    tune_lr : float or None
        Its rate, whatever ``train`` is told; None takes ``lr``.
    clip_before : float or None
        Largest norm of all trained gradients together before they are masked.
    reversed_share : float
        Share of the model's parameters that train besides, in neurons from the other end of the order.
    """

    num_neurons: int | None = field(default=None, metadata=formerly("k"))
    parameter_share: float = field(default=0.09, metadata=formerly("share"))
    targets: tuple[str, ...] = neurons.DEFAULT
    select_by: str = field(default="changed", metadata=formerly("mode"))
    reference: Run | Mapping[str, str] | str | Path | None = field(default=None, metadata=formerly("tuned"))
    neurons: Mapping[str, Collection[Any]] | None = None
    tune_steps: int | None = None
    tune_lr: float | None = None
    clip_before: float | None = None
    reversed_share: float = field(default=0.0, metadata=added_later())
    lr: float = 2e-5
    head_lr: float = 1e-4

    def __post_init__(self) -> None:
        if self.select_by not in MODES:
            raise ValueError(f"select_by {self.select_by!r} is unknown: {', '.join(MODES)}")
        if unknown := [role for role in self.targets if role not in neurons.ROLES]:
            raise ValueError(
                f"targets: {unknown[0]!r} is no role with neurons: give some of {', '.join(neurons.ROLES)}"
            )
        if self.num_neurons is not None and self.num_neurons < 1:
            raise ValueError(f"num_neurons {self.num_neurons} chooses no neuron: give 1 or more")
        if not 0 < self.parameter_share <= 1:
            told = f"parameter_share {self.parameter_share} is no share of the parameters"
            raise ValueError(f"{told}: give one above 0, at most 1")
        if not 0 <= self.reversed_share <= 1:
            raise ValueError(f"reversed_share {self.reversed_share} is no share of the parameters: give 0 to 1")
        if self.reversed_share and self.select_by != "changed":
            raise ValueError(
                f"reversed_share adds to select_by 'changed', not to {self.select_by!r}: leave one of them"
            )
        if self.tune_steps is not None and self.tune_steps < 1:
            raise ValueError(f"tune_steps {self.tune_steps} tunes nothing: give 1 or more, or none for those of train")
        if self.clip_before is not None and not self.clip_before > 0:
            raise ValueError(f"clip_before {self.clip_before} is no norm to clip to: give one above 0, or none")
        if self.neurons is not None:
            self.neurons = neurons.to_plain_ints(self.neurons)
        if isinstance(self.reference, Run):
            _check_kind(self.reference, self.select_by)
        self.neurons_: dict[str, list[int]] = {}

    def prepare(self) -> None:
        """Load ``reference`` from its folder."""
        if isinstance(self.reference, str | Path):
            reference = loading.load(self.reference)
            _check_kind(reference, self.select_by)
            self.reference = reference

    def phases(self, base: Mapping[str, Tensor]) -> Generator[Phase, Run, None]:
        """Full fine-tuning or probing, unless it was done or nothing is to be learned from it; then the neurons."""
        if self.reference is not None or self.neurons is not None or self.select_by == "random":
            yield Phase(self)
            return
        if self.select_by == "probed":
            reference = yield Phase(Probing(targets=self.targets, head_lr=self.head_lr), "probe", steps=self.tune_steps)
        else:
            full = Full(lr=self.lr if self.tune_lr is None else self.tune_lr, head_lr=self.head_lr)
            reference = yield Phase(full, "tune", steps=self.tune_steps, lr=self.tune_lr)
        yield Phase(replace(self, reference=reference), "masked")

    def attach(self, model: nn.Module) -> None:
        """Choose the neurons; leave the projections that hold some trainable, and the task's head."""
        self.prepare()
        self._parts = neurons.parts(module_table.describe(model), self.targets)
        self._scores = scores(model, self._parts, self.reference) if isinstance(self.reference, Run) else None
        self.neurons_ = self._choose(model)
        model.requires_grad_(False)
        axes = {part.module: part.axis for part in self._parts}
        self._masks = {name: Mask.of(model, name, axes[name], chosen) for name, chosen in self.neurons_.items()}
        for trained in (*(mask.weight for mask in self._masks.values()), *task_head(model).values()):
            trained.requires_grad_(True)

    def _choose(self, model: nn.Module) -> dict[str, list[int]]:
        """The neurons that train, by module; a method read from a run folder has them in its state alone."""
        if self.neurons is not None:
            return neurons.check_neurons(self.neurons, self._parts)
        pool, seed = self._scores, 0
        if self.select_by == "random":
            pool = neurons.unscored_neurons(self._parts) if pool is None else pool
            seed = int(torch.randint(2**31, ()))  # follows from the run's seed
        if pool is None:
            return {}
        width = sum(part.count * part.width for part in self._parts) / sum(part.count for part in self._parts)
        total = sum(parameter.numel() for parameter in model.parameters())
        by = PROBE_COSINE if PROBE_COSINE in pool else "cosine_distance"
        free = int(pool[by].notna().sum())
        k = self.num_neurons or self._counted("parameter_share", total, width, free)
        first = neurons.select(pool, k, "changed" if self.select_by == "probed" else self.select_by, seed, by)
        others = self._counted("reversed_share", total, width, free - k) if self.reversed_share else 0
        return neurons.by_module(pd.concat([first, neurons.select(pool, others, "reversed")]) if others else first)

    def _counted(self, name: str, total: int, width: float, free: int) -> int:
        """How many neurons a share of the parameters is; a ValueError where it is none, or more than are free."""
        share = getattr(self, name)
        count = neurons.count(share, total, width)
        if count < 1:
            raise ValueError(f"{name} {share} is no neuron: one alone is {width / total:.2g} of the parameters")
        if count > free:
            most = f"{free:,} are left to choose, {free * width / total:.2g} of the parameters"
            raise ValueError(f"{name} {share} is {count:,} neurons: {most}")
        return count

    def after_backward(self, step: Step) -> None:
        """Mask the gradients, once all of the batch is in them."""
        trained = [parameter for group in step.optimizer.param_groups for parameter in group["params"]]
        self._unmasked = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if self.clip_before is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, self.clip_before, self._unmasked)
        for mask in self._masks.values():
            if mask.weight.grad is not None:
                mask.weight.grad.masked_fill_(mask.still, 0.0)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Put back what weight decay moved without any gradient."""
        if any(group["weight_decay"] for group in step.optimizer.param_groups):
            for module, mask in self._masks.items():
                mask.weight.copy_(torch.where(mask.still, step.base[f"{module}.weight"], mask.weight))

    def frozen_entry_count(self) -> int:
        """What the masks cover."""
        return sum(mask.covered for mask in self._masks.values())

    def records(self, step: Step) -> Iterable[Record]:
        """At the start what was chosen and by what, at the end where every neuron is, and that no other moved."""
        if step.finished == 0:
            for module, chosen in self.neurons_.items():
                yield Record("selected", np.ones(len(chosen)), module, np.array(chosen))
            if self._scores is not None:
                if self.select_by == "probed":
                    yield from _records(PROBE_COSINE, self._scores, PROBE_COSINE)
                else:
                    yield from _records("selection_cosine", self._scores)
        else:
            yield Record("unmasked_norm", float(self._unmasked))
        if step.last:
            living = dict(step.model.named_parameters())
            yield from _records("neuron_cosine", distances(step.model, self._parts, step.base, living))
            for module, mask in self._masks.items():
                change = (mask.weight.detach() - step.base[f"{module}.weight"]).abs()
                yield Record("leak", float(change.masked_fill(~mask.still, 0.0).max()), module)


class Mask(NamedTuple):
    """What holds the neurons of one module still that were not chosen.

    ``still`` has the layout of the stored weight, one entry a neuron, to be broadcast along their vectors.
    """

    weight: nn.Parameter
    still: Bool[Tensor, "rows columns"]

    @classmethod
    def of(cls, model: nn.Module, module: str, axis: int, chosen: Sequence[int]) -> Mask:
        """Of a module whose neurons' vectors run along this axis of its weight (out, in)."""
        host: Any = model.get_submodule(module)
        weight = host_weight(host)
        still = torch.ones(weight.shape[1 - axis], dtype=torch.bool, device=weight.device)
        still[torch.tensor(chosen)] = False
        return cls(host.weight, orient_weight(host, still.unsqueeze(axis)))

    @property
    def covered(self) -> int:
        """Weights that do not move."""
        return int(self.still.sum()) * self.weight.numel() // self.still.numel()


def _check_kind(tuned: Run, mode: str) -> None:
    """Refuse what neurons cannot be chosen by: adapters, a run of the other kind, or one of a few neurons alone."""
    name, needed = tuned.meta["method"]["name"], Probing if mode == "probed" else Full
    if tuned.meta.get("w0_hash") is None:
        kind = "recorded under a Trainer" if "source" not in tuned.meta else "an adapter from elsewhere"
        mend = f"{kind}, which does not tell at what weights it began: give a run of ls.train, or none"
    elif name == NeFT.name:
        before = [run.path.resolve() for run in tuned.parents if run.path and run.meta["method"]["name"] == needed.name]
        kind = "probing" if needed is Probing else "full fine-tuning"
        told = f"the phase before it, {before[0]}" if before else f"one of {kind}, or none"
        mend = f"which trained {len(selected_neurons.list_selected(tuned)):,} neurons alone: give {told}"
    elif name == Probing.name and needed is Full:
        mend = "a run of probing: give one of full fine-tuning"
    elif name != Probing.name and needed is Probing:
        mend = "no run of probing: give one, or none"
    else:
        return
    raise ValueError(f"select_by {mode!r} cannot choose by {tuned.id} ({tuned.label}), {mend}")


def scores(model: nn.Module, places: Sequence[neurons.Part], tuned: Run) -> pd.DataFrame:
    """Equation 1 for every neuron of a model at W_0 and of its full fine-tuning, with norms: ``neurons.COLUMNS``.

    A run of probing gives its ``probe_cosine`` instead.

    Raises
    ------
    ValueError
        The run began at other weights, or did not train or probe a projection.
    """
    if weights_hash(model) != tuned.meta["w0_hash"]:
        raise ValueError(f"run {tuned.id} began at other weights than this model's: tune the same model")
    if tuned.meta["method"]["name"] == Probing.name:
        return probe_scores(tuned, places)
    after = tuned.tensors()
    if absent := [part.module for part in places if f"{part.module}.weight" not in after]:
        raise ValueError(f"run {tuned.id} ({tuned.label}) did not train {absent[0]}: give one of full fine-tuning")
    wide = Lazy(list(after), lambda name: torch.from_numpy(np.array(after[name])))
    return distances(model, places, dict(model.named_parameters()), wide)


def distances(
    model: nn.Module, places: Sequence[neurons.Part], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> pd.DataFrame:
    """Cosine distance of every neuron, with its norms, between two states of a model given by parameter name."""
    tables = []
    for part in places:
        host, name = model.get_submodule(part.module), f"{part.module}.weight"
        tables.append(neurons.table(part, *(to_array(orient_weight(host, side[name])) for side in (before, after))))
    return pd.concat(tables, ignore_index=True)


def _records(quantity: str, scored: pd.DataFrame, column: str = "cosine_distance") -> Iterable[Record]:
    for module, rows in scored.groupby("module", sort=False):
        yield Record(quantity, rows[column].to_numpy(), str(module), rows["neuron"].to_numpy())
