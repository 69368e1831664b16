"""The one table: what is recorded, under which names, and how it is checked.

A table is long: one row a value, with the columns ``COLUMNS``. The key ``(run, step, module, quantity, index)`` is
unique. ``step`` counts finished optimizer steps; values of the whole run stand under ``module=""``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from lorascope.files.printable import printable
from lorascope.schema.module_table import ROLES, parse

COLUMNS = ("run", "step", "module", "stack", "layer", "role", "quantity", "index", "value")
KEY = ["run", "step", "module", "quantity", "index"]
_CATEGORICAL = ("run", "module", "stack", "role", "quantity")
_DTYPES = {"step": "Int64", "layer": "Int16", "index": "Int32", "value": "float64"}


@dataclass(frozen=True, slots=True)
class Quantity:
    """What a recorded number means.

    Parameters
    ----------
    label : str
        Axis label.
    unit : str
        Unit, "" for a pure number.
    index : str
        What the column ``index`` counts: component, rank_id, neuron, head, coefficient, group or none.
    pool : {"norm", "sum", "mean"}
        How one cell sums up several modules: root of summed squares, sum, or mean.
    definition : str
        The formula in words or symbols.
    source : str
        Paper or convention it is taken from.
    """

    label: str
    unit: str = ""
    index: str = "none"
    pool: Literal["norm", "sum", "mean"] = "mean"
    definition: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """One recorded value, or one vector of values.

    Parameters
    ----------
    quantity : str
        A name of ``QUANTITIES``.
    value : float or array (n,)
        The value; a vector becomes n rows.
    module : str
        Dotted module name, "" for the whole run.
    index : int, array (n,) or None
        Index of the value; for a vector None means 0..n-1.
    """

    quantity: str
    value: Any
    module: str = ""
    index: Any = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An array kept beside the table: factors, and whatever has two or more indices.

    Parameters
    ----------
    name : str
        ``"module/factor"``.
    array : array
        Any shape; its dtype is kept.
    axes : sequence of str
        A name for each dimension, for the long form.
    labels : mapping axis -> list
        Labels along an axis, where it has some.
    """

    name: str
    array: Any
    axes: Sequence[str] = ()
    labels: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of one adapter, kept beside the table.

    Parameters
    ----------
    module : str
    arrays : mapping factor -> array
        Such as ``{"A": (rank, in), "B": (out, rank)}``.
    scale : float or None
        Where the update is ``scale * B @ A``; None for any other form.
    exact : bool
        False where ``scale * B @ A`` stands for an update that depends on the input.
    """

    module: str
    arrays: Mapping[str, Any]
    scale: float | None = None
    exact: bool = True


Item = Record | Snapshot | Factors

_LISA = "LISA, section 3.1"
QUANTITIES: dict[str, Quantity] = {
    "loss": Quantity("training loss", "nats", definition="task loss of the step's batch, without penalties"),
    "eval_loss": Quantity("validation loss", "nats", definition="mean task loss on the validation split"),
    "test_loss": Quantity("test loss", "nats", definition="mean task loss on the test split"),
    "eval_metric": Quantity("validation metric", definition="accuracy, or perplexity of the counted tokens"),
    "test_metric": Quantity("test metric", definition="accuracy, or perplexity of the counted tokens"),
    "test_metric_group": Quantity("test metric", index="group", definition="test metric within one group of the task"),
    "lr": Quantity("learning rate", definition="rate of the first parameter group in this step"),
    "grad_norm": Quantity("gradient norm", pool="norm", definition="norm of all trained gradients before clipping"),
    "seconds": Quantity("time", "s", pool="sum", definition="wall-clock time since the run began"),
    "peak_bytes": Quantity("peak memory", "bytes", pool="sum", definition="high-water mark of one step"),
    "parameter_bytes": Quantity("parameter memory", "bytes", pool="sum", definition="bytes of live parameters"),
    "gradient_bytes": Quantity("gradient memory", "bytes", pool="sum", definition="bytes of live gradients"),
    "optimizer_bytes": Quantity("optimizer memory", "bytes", pool="sum", definition="bytes of optimizer tensors"),
    "weight_norm": Quantity("‖W‖", pool="norm", definition="Frobenius norm of the effective weight", source=_LISA),
    "update_norm": Quantity("‖W − W₀‖", pool="norm", definition="Frobenius norm of the update since W_0"),
    "learned_norm": Quantity("‖ΔW − ΔW₀‖", pool="norm", definition="Frobenius norm of what training added"),
    "relative_update": Quantity("‖W − W₀‖ / ‖W₀‖", pool="mean", definition="update_norm over the norm of W_0"),
    "step_norm": Quantity("‖Wₜ − Wₜ₋₁‖", pool="norm", definition="Frobenius norm of one step's change"),
    "adapter_norm": Quantity("√(‖A‖² + ‖B‖²)", pool="norm", definition="norm of all the adapter's factors together"),
    "stable_rank": Quantity("stable rank", definition="|dW|_F^2 / sigma_1^2"),
    "effective_rank": Quantity("effective rank", definition="exp of the entropy of sigma / sum(sigma)"),
    "rank": Quantity("rank", pool="sum", definition="number of components of the update that are in use"),
    "budget": Quantity("rank budget", pool="sum", definition="number of components all modules may have together"),
    "sensitivity_out": Quantity(
        "sensitivity of outputs", index="neuron", pool="sum", definition="sum over j of |W_ij dL/dW_ij|, of row i"
    ),
    "sensitivity_in": Quantity(
        "sensitivity of inputs", index="neuron", pool="sum", definition="sum over i of |W_ij dL/dW_ij|, of column j"
    ),
    "importance": Quantity("importance", index="rank_id", definition="score by which an allocator ranks a component"),
}


_adopted: set[str] = set()  # known from a run alone, until the code that records them says what they mean


def adopt(quantities: Mapping[str, Mapping[str, Any]]) -> None:
    """Take up what a run says of the quantities in its table, where the catalogue does not know them."""
    for name in quantities.keys() - QUANTITIES.keys():
        QUANTITIES[name] = Quantity(**quantities[name])
        _adopted.add(name)


def register(name: str, quantity: Quantity) -> None:
    """Add a method's own quantity to the catalogue; the same name with another meaning is an error."""
    if name in _adopted:
        _adopted.remove(name)
        del QUANTITIES[name]
    if QUANTITIES.setdefault(name, quantity) != quantity:
        raise ValueError(f"quantity {name!r} is already registered with another meaning: {QUANTITIES[name]}")


def frame(run: str, rows: Sequence[tuple[int, Record]], modules: pd.DataFrame) -> pd.DataFrame:
    """Turn recorded rows into a validated table.

    Parameters
    ----------
    run : str
        Run id.
    rows : sequence of (step, Record)
        ``step`` is the number of finished optimizer steps, -1 for NA.
    modules : DataFrame
        ``names.describe`` of the model: gives stack, layer and role of each module.

    Returns
    -------
    DataFrame
        With the columns ``COLUMNS``.
    """
    steps, names, quantities, indices, values = [], [], [], [], []
    for step, record in rows:
        value = np.atleast_1d(np.asarray(record.value, dtype=np.float64))
        vector = np.ndim(record.value) > 0
        index = record.index if record.index is not None else (np.arange(len(value)) if vector else -1)
        steps.append(np.full(len(value), step))
        names.extend([record.module] * len(value))
        quantities.extend([record.quantity] * len(value))
        indices.append(np.broadcast_to(np.asarray(index, dtype=np.int64), value.shape))
        values.append(value)
    step_column = pd.Series(np.concatenate(steps) if steps else [], dtype="Int64")
    index_column = pd.Series(np.concatenate(indices) if indices else [], dtype="Int32")
    places = modules.drop_duplicates("module").set_index("module")[["stack", "layer", "role"]]
    # A second name of a tied weight has no row of its own.
    others = {name: parse(name) for name in set(names) - {""} - set(places.index)}
    place = pd.concat([places, pd.DataFrame.from_dict(others, orient="index", columns=places.columns)]).reindex(names)
    table = pd.DataFrame(
        {
            "run": pd.Series([run] * len(names), dtype="str"),
            "step": step_column.mask(step_column == -1),
            "module": pd.Series(names, dtype="str"),
            "stack": pd.Series(place["stack"].fillna("").to_numpy(), dtype="str"),
            "layer": pd.Series(place["layer"].array, dtype="Int16"),
            "role": pd.Series(place["role"].fillna("").to_numpy(), dtype="str"),
            "quantity": pd.Series(quantities, dtype="str"),
            "index": index_column.mask(index_column == -1),
            "value": pd.Series(np.concatenate(values) if values else [], dtype="float64"),
        }
    )
    return validate(table)


def validate(table: pd.DataFrame) -> pd.DataFrame:
    """Check a table against the schema and give it the schema's dtypes.

    Raises
    ------
    ValueError
        A column is missing, a quantity is unknown, or two rows have the same key.
    """
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing:
        raise ValueError(f"the table lacks the columns {', '.join(missing)}; it needs {', '.join(COLUMNS)}")
    for name in _DTYPES:
        if not (pd.api.types.is_numeric_dtype(table[name]) or table[name].isna().all()):
            raise ValueError(f"column {name} must hold numbers, got {table[name].dtype}")
    try:
        table = table[list(COLUMNS)].astype(_DTYPES | dict.fromkeys(_CATEGORICAL, "category"))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"a column must hold {', '.join(f'{n} as {t}' for n, t in _DTYPES.items())}: {error}"
        ) from error
    for name in _CATEGORICAL:
        if not (table[name].notna().all() and all(isinstance(text, str) for text in table[name].cat.categories)):
            raise ValueError(f"column {name} must hold text in every row")
    for name in ("step", "layer", "index"):
        if (table[name] < 0).any():
            raise ValueError(f"column {name} must be >= 0, got {table[name].min()}")
    odd = set(table["role"].cat.categories) - {"", *ROLES}
    if odd:
        raise ValueError(f"column role must hold {', '.join(ROLES)}, got {printable(min(odd))!r}")
    unknown = sorted(set(table["quantity"].cat.categories) - QUANTITIES.keys())
    if unknown:
        raise ValueError(f"unknown quantity {printable(unknown[0])!r}: register it in records.QUANTITIES first")
    twice = table.duplicated(KEY)
    if twice.any():
        row = table[twice].iloc[0]
        whose = printable(row["module"] or "the run")
        raise ValueError(f"{row['quantity']} of {whose} is recorded twice at step {row['step']}")
    return table


def concat(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Join tables of several runs into one, categories united."""
    plain = [table.astype(dict.fromkeys(_CATEGORICAL, "str")) for table in tables]
    if not plain:
        return frame("", [], pd.DataFrame(columns=["module", "stack", "layer", "role"]))
    return validate(pd.concat(plain, ignore_index=True))
