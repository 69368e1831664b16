"""Columns of a table that make a task: its kind, the ends of its prompts, and labels that have to be visible."""

from __future__ import annotations

import reprlib

import pandas as pd

from lorascope.inputs import labels as label_values
from lorascope.inputs import sources


def read_kind(rows: pd.DataFrame, name: str, requested: str | None) -> tuple[str, list[str]]:
    """Return the kind of task that the columns define, and the columns that a model reads."""
    columns = set(rows.columns)
    if requested not in (None, "classification", "regression"):
        raise ValueError(f"kind must be 'classification' or 'regression', got {requested!r}")
    if requested is not None and not {"text", "label"} <= columns:
        raise ValueError(f"columns of {name} must include text and label for kind={requested!r}")
    if {"prompt", "response"} <= columns:
        return "prompt", ["prompt", "response"]
    if {"prompt", "choices", "answer"} <= columns:
        return "choice", ["prompt"]
    if {"question", "context", "answers"} <= columns:
        return "span", ["context", "question"]  # questions about one context are in one split
    if {"text", "label"} <= columns:
        if requested is None and label_values.has_fractions(rows["label"]):
            requested = "regression"
        return requested or "classification", ["text", "pair"] if "pair" in columns else ["text"]
    if {"image", "label"} <= columns:
        return "image", ["image"]
    if columns - {"group", "cluster", "split"} == {"text"}:
        return "lm", ["text"]
    pairs = "text and label, image and label, prompt and response, prompt, choices and answer"
    spans = "or question, context, answers and answer_start"
    raise ValueError(
        f"columns of {name} must include {pairs}, {spans}, or be text only, got {', '.join(map(str, rows.columns))}"
    )


def end_prompts(rows: pd.DataFrame, ending: str, name: str) -> pd.DataFrame:
    """Return rows with a text appended to each prompt; a prompt that is not a text stays, and raises later."""
    if "prompt" not in rows:
        raise ValueError(f"prompt_end must be None for {name}, which has no column prompt, got {ending!r}")
    prompts = rows["prompt"].to_list()
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            prompts[number] = f"{prompt}{ending}"
    return rows.assign(prompt=prompts)


def require_closed_choices(table: pd.DataFrame, name: str) -> None:
    """Raise a ValueError if a row outside train has a single choice, which would always be selected."""
    if "choices" not in table:
        return
    single = table[(table["split"] != "train") & (table["choices"].map(len) == 1)]
    if not single.empty:
        split, texts = single[["split", "choices"]].iloc[0]
        raise ValueError(
            f"choices in the {split} split of {name} must be at least 2, got {reprlib.repr(texts)}: a row with a "
            f"response only must be in train"
        )


def require_known_labels(table: pd.DataFrame, name: str) -> None:
    """Raise a ValueError if rows of a split have hidden labels, as the test rows of benchmarks do."""
    hidden = table.iloc[:0]
    if "label" in table:
        hidden = table[table["label"].isin([sources.HIDDEN_LABEL]) | table["label"].isna()]
    if "answer" in table:
        hidden = table[table["answer"] == sources.HIDDEN_ANSWER]
    if not hidden.empty:
        split = hidden["split"].iloc[0]
        raise ValueError(
            f'cannot use the {split} split of {name}: its labels are hidden (-1); map {split} to "validation"'
        )
