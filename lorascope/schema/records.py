"""Schema of the record table: columns, quantities, records and validation.

The table is in long form: one row per value, with the columns ``COLUMNS``. The key ``(run, step, module, quantity,
index)`` is unique. ``step`` counts finished optimizer steps. Values of the whole run have ``module=""``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import printable
from lorascope.schema.module_table import ROLES, parse

COLUMNS = ("run", "step", "module", "stack", "layer", "role", "quantity", "index", "value")
KEY = ["run", "step", "module", "quantity", "index"]
_CATEGORICAL = ("run", "module", "stack", "role", "quantity")
_DTYPES = {"step": "Int64", "layer": "Int16", "index": "Int32", "value": "float64"}


@dataclass(frozen=True, slots=True)
class Quantity:
    """Meaning of a quantity in the records.

    Parameters
    ----------
    label : str
        Axis label.
    unit : str
        Unit, "" if dimensionless.
    index : str
        Meaning of the column ``index``, such as component, rank_id, neuron, head or group; "none" without an index.
    pool : {"norm", "sum", "mean"}
        Aggregation over several modules: root of the sum of squares, sum, or mean.
    definition : str
        Definition, as text or formula.
    source : str
        Paper or convention that defines it.
    recorded_by : str
        What to do to get it recorded; figures say so when a run lacks the quantity.
    """

    label: str
    unit: str = ""
    index: str = "none"
    pool: Literal["norm", "sum", "mean"] = "mean"
    definition: str = ""
    source: str = ""
    recorded_by: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """Record of one value, or of one vector of values.

    Parameters
    ----------
    quantity : str
        A key of ``QUANTITIES``.
    value : float or array (n,)
        Value; a vector becomes n rows.
    module : str
        Dotted module name, "" for the whole run.
    index : int, array (n,) or None
        Index of each value. None means 0..n-1 for a vector and no index for a single value.
    """

    quantity: str
    value: Any
    module: str = ""
    index: Any = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Array stored next to the table of records: singular values, factors, all arrays with two or more indices.

    Parameters
    ----------
    name : str
        Such as ``"module/factor"``.
    array : array
        Any shape; the dtype is preserved.
    axes : sequence of str
        Name of each dimension, for the conversion to long form.
    labels : mapping axis -> list
        Labels along an axis, for axes that have labels.
    """

    name: str
    array: Any
    axes: Sequence[str] = ()
    labels: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Factors:
    """Factors of one adapter, stored next to the table of records.

    Parameters
    ----------
    module : str
        Dotted module name.
    arrays : mapping factor -> array
        Such as ``{"A": (rank, in), "B": (out, rank)}``.
    scale : float or None
        Scale of the update; None if the factors do not form one.
    exact : bool
        False if the update depends on the input, so that the factors represent it only at fixed gates.
    form : str, optional
        Name of the update's form; by default it follows from the names of the factors.
    """

    module: str
    arrays: Mapping[str, Any]
    scale: float | None = None
    exact: bool = True
    form: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """Text that trackers show next to the records during training, such as an alarm; runs do not store it.

    Parameters
    ----------
    name : str
        Name under which trackers show it, such as ``"alarm/LS001"``.
    text : str
        The text.
    """

    name: str
    text: str


Item = Record | Snapshot | Factors | Message

QUANTITIES: dict[str, Quantity] = {}
_adopted: set[str] = set()  # known only from a stored run; replaced when the module that records them is imported


def adopt(quantities: Mapping[str, Quantity]) -> None:
    """Add the quantities of a stored run's records to ``QUANTITIES``, except those that are already there."""
    for name in quantities.keys() - QUANTITIES.keys():
        QUANTITIES[name] = quantities[name]
        _adopted.add(name)


def register(recorded_by: str, source: str = "", /, **quantities: Quantity) -> None:
    """Register quantities of records in ``QUANTITIES``; they replace the entries of a stored run.

    Parameters
    ----------
    recorded_by : str
        What to do to get them recorded; see `Quantity`.
    source : str, optional
        Source of the quantities that state none.
    **quantities : Quantity
        Quantities by name.

    Raises
    ------
    ValueError
        A name is already registered with another meaning.
    """
    for name, quantity in quantities.items():
        if name in _adopted:
            _adopted.remove(name)
            del QUANTITIES[name]
        described = replace(quantity, recorded_by=recorded_by, source=quantity.source or source)
        if QUANTITIES.setdefault(name, described) != described:
            raise ValueError(f"cannot register quantity {name!r}: it is already registered as {QUANTITIES[name]}")


register(
    "train with any method",
    loss=Quantity("training loss", "nats", definition="task loss of the step's batch, without penalties"),
    lr=Quantity("learning rate", definition="learning rate of the first parameter group at this step"),
    grad_norm=Quantity("gradient norm", pool="norm", definition="global norm of trained gradients before clipping"),
    seconds=Quantity("time", "s", pool="sum", definition="wall-clock time since the start of the run"),
    peak_bytes=Quantity("peak memory", "bytes", pool="sum", definition="peak memory of one step"),
)
register(
    "train with eval_every=",
    eval_loss=Quantity("validation loss", "nats", definition="mean task loss on the validation split"),
    eval_metric=Quantity("validation metric", definition="accuracy, or perplexity over the scored tokens"),
)
register(
    "train on a task with a test split",
    test_loss=Quantity("test loss", "nats", definition="mean task loss on the test split"),
    test_metric=Quantity("test metric", definition="accuracy, or perplexity over the scored tokens"),
)
register(
    "train on a task with a test split and groups",
    test_metric_group=Quantity("test metric", index="group", definition="test metric within one group of the task"),
)
register(
    "train with observe=[ls.observe.memory()]",
    parameter_bytes=Quantity("parameter memory", "bytes", pool="sum", definition="bytes of live parameters"),
    gradient_bytes=Quantity("gradient memory", "bytes", pool="sum", definition="bytes of live gradients"),
    optimizer_bytes=Quantity("optimizer memory", "bytes", pool="sum", definition="bytes of optimizer tensors"),
)
register(
    "train with observe=[ls.observe.norms()]",
    weight_norm=Quantity(
        "‖W‖", pool="norm", definition="Frobenius norm of the effective weight", source="LISA, section 3.1"
    ),
    update_norm=Quantity("‖W − W₀‖", pool="norm", definition="Frobenius norm of the update W − W₀"),
    learned_norm=Quantity(
        "‖ΔW − ΔW₀‖",
        pool="norm",
        definition="Frobenius norm of the learned update, with ΔW = W − W₀ and ΔW₀ its value at step 0",
    ),
    relative_update=Quantity("‖W − W₀‖ / ‖W₀‖", pool="mean", definition="norm of W − W₀ over that of W₀"),
    step_norm=Quantity("‖Wₜ − Wₜ₋₁‖", pool="norm", definition="Frobenius norm of the change in one step"),
    adapter_norm=Quantity("√(‖A‖² + ‖B‖²)", pool="norm", definition="joint Frobenius norm of all trained factors"),
    factor_change=Quantity(
        "√(‖A − A₀‖² + ‖B − B₀‖²)",
        pool="norm",
        definition="joint Frobenius norm of the change of all trained factors; unknown for factors that are resized",
    ),
)
register(
    "train adapters with observe=[ls.observe.norms()]",
    stable_rank=Quantity("stable rank", definition="‖W − W₀‖² / σ₁²"),
    effective_rank=Quantity("effective rank", definition="exp of the entropy of σ / Σσ"),
    rank=Quantity("rank", pool="sum", definition="number of components of the update in use"),
)
register(
    "train with observe=[ls.observe.neurons()]",
    sensitivity_out=Quantity(
        "sensitivity of outputs", index="neuron", pool="sum", definition="sum over j of |W_ij dL/dW_ij| for row i"
    ),
    sensitivity_in=Quantity(
        "sensitivity of inputs", index="neuron", pool="sum", definition="sum over i of |W_ij dL/dW_ij| for column j"
    ),
    shuffled_sensitivity_out=Quantity(
        "sensitivity of outputs, gradients shuffled",
        index="neuron",
        pool="sum",
        definition="expected sensitivity_out if the gradients of a module are shuffled, mean |dL/dW| sum_j |W_ij|",
    ),
    shuffled_sensitivity_in=Quantity(
        "sensitivity of inputs, gradients shuffled",
        index="neuron",
        pool="sum",
        definition="expected sensitivity_in if the gradients of a module are shuffled, mean |dL/dW| sum_i |W_ij|",
    ),
)
register(
    "train with a method that allocates ranks, such as AdaLoRA",
    budget=Quantity("rank budget", pool="sum", definition="maximum total number of components of all modules"),
    importance=Quantity("importance", index="rank_id", definition="score by which an allocator orders components"),
)


def frame(run: str, rows: Sequence[tuple[int, Record]], modules: pd.DataFrame) -> pd.DataFrame:
    """Turn pairs of finished steps (-1 for NA) and records of a run into a validated table.

    ``modules`` is ``module_table.describe(model)``, which gives stack, layer and role of each module.
    """
    names: list[str] = []
    quantities: list[str] = []
    # The empty arrays give the columns their dtypes if there is no row.
    steps, indices, values = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0)]
    for step, record in rows:
        value = np.atleast_1d(np.asarray(record.value, dtype=np.float64))
        index = record.index
        if index is None:
            index = -1  # becomes NA below
            if np.ndim(record.value) > 0:
                index = np.arange(len(value))
        steps.append(np.full(len(value), step))
        names.extend([record.module] * len(value))
        quantities.extend([record.quantity] * len(value))
        indices.append(np.broadcast_to(np.asarray(index, dtype=np.int64), value.shape))
        values.append(value)
    step_column = pd.Series(np.concatenate(steps), dtype="Int64")
    index_column = pd.Series(np.concatenate(indices), dtype="Int32")
    locations = modules.drop_duplicates("module").set_index("module")[["stack", "layer", "role"]]
    # The other names of a tied weight have no row in ``modules``.
    parsed = {name: parse(name) for name in set(names) - {""} - set(locations.index)}
    parsed_locations = pd.DataFrame.from_dict(parsed, orient="index", columns=locations.columns)
    location = pd.concat([locations, parsed_locations]).reindex(names)
    table = pd.DataFrame(
        {
            "run": pd.Series([run] * len(names), dtype="str"),
            "step": step_column.mask(step_column == -1),
            "module": pd.Series(names, dtype="str"),
            "stack": pd.Series(location["stack"].fillna("").to_numpy(), dtype="str"),
            "layer": pd.Series(location["layer"].array, dtype="Int16"),
            "role": pd.Series(location["role"].fillna("").to_numpy(), dtype="str"),
            "quantity": pd.Series(quantities, dtype="str"),
            "index": index_column.mask(index_column == -1),
            "value": pd.Series(np.concatenate(values), dtype="float64"),
        }
    )
    return validate(table)


def validate(table: pd.DataFrame) -> pd.DataFrame:
    """Check a table of records against its schema and convert it to the schema's dtypes.

    Raises
    ------
    ValueError
        A column is missing or has invalid values, a quantity is unknown, or two rows have the same key.
    """
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing:
        raise ValueError(f"missing columns {', '.join(missing)}; expected {', '.join(COLUMNS)}")
    for name in _DTYPES:
        # A column without any value may have any dtype.
        if not (pd.api.types.is_numeric_dtype(table[name]) or table[name].isna().all()):
            raise ValueError(f"column {name} must be numeric, got {table[name].dtype}")
    try:
        table = table[list(COLUMNS)].astype(_DTYPES | dict.fromkeys(_CATEGORICAL, "category"))
    except (TypeError, ValueError, OverflowError) as error:
        dtypes = ", ".join(f"{name}: {dtype}" for name, dtype in _DTYPES.items())
        raise ValueError(f"cannot convert columns to {dtypes}: {error}") from error
    for name in _CATEGORICAL:
        is_text = all(isinstance(category, str) for category in table[name].cat.categories)
        if not (is_text and table[name].notna().all()):
            raise ValueError(f"column {name} must contain text in every row")
    for name in ("step", "layer", "index"):
        if (table[name] < 0).any():
            raise ValueError(f"column {name} must be >= 0, got {table[name].min()}")
    unknown_roles = set(table["role"].cat.categories) - {"", *ROLES}
    if unknown_roles:
        raise ValueError(f"column role must be one of {', '.join(ROLES)}, got {printable(min(unknown_roles))!r}")
    unknown = sorted(set(table["quantity"].cat.categories) - QUANTITIES.keys())
    if unknown:
        raise ValueError(f"unknown quantity {printable(unknown[0])!r}; register it with records.register first")
    return _require_unique(table)


def _require_unique(table: pd.DataFrame) -> pd.DataFrame:
    is_duplicate = table.duplicated(KEY)
    if is_duplicate.any():
        row = table[is_duplicate].iloc[0]
        subject = printable(row["module"] or "the run")
        raise ValueError(f"duplicate record: {row['quantity']} of {subject} at step {row['step']}")
    return table


def concat(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Concatenate valid tables of records, such as those of several runs, and merge their categories."""
    # pandas concatenates columns with different categories as objects.
    plain = [table.astype(dict.fromkeys(_CATEGORICAL, "str")) for table in tables]
    if not plain:
        return frame("", [], pd.DataFrame(columns=["module", "stack", "layer", "role"]))
    return _require_unique(pd.concat(plain, ignore_index=True).astype(dict.fromkeys(_CATEGORICAL, "category")))
