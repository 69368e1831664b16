"""Verification of planted evidence: green as written, and red at the right place for every tampering."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import page_blocks
import pandas as pd
import pytest

from lorascope.papers.judging import kept_runs, registration, verification
from lorascope.papers.judging.evidence_manifest import full_manifest
from lorascope.papers.judging.kept_runs import RUN_COLUMNS
from lorascope.papers.judging.registration import RegisteredArm, Registration, arm_hash
from lorascope.papers.judging.statistics import COURSE, Accuracy, Constant, OfPairs, OfRun
from lorascope.papers.judging.verification import derive, verify, write_derived

ROWS = 40
GRID = (3e-4, 1e-3, 3e-3)
SETTINGS = {"steps": 300, "batch_size": 16}
TOML = """
[[claim]]
id = "p.better"
paper = { arxiv = "1", place = "table 1", tier = "primary" }
text = { sentence = "A is better.", statistic = "accuracy of A", control = "accuracy of B", control_kind = "arm" }
bound = { kind = "superiority", margin = 0.1, unit = "accuracy", from = "planted" }
design = { interval = "two-way", looks = [5, 10], levels = [0.005, 0.0215], first_seed = 100 }
arms = ["A", "B"]
code = "sha256:p.better"

[[claim]]
id = "p.share"
paper = { arxiv = "1", place = "table 2", tier = "secondary" }
text = { sentence = "A has more.", statistic = "share", control = "a third", control_kind = "constant" }
bound = { kind = "superiority", margin = 0.02, unit = "share", from = "planted" }
design = { interval = "t", looks = [5], levels = [0.025], first_seed = 100 }
arms = ["A"]
code = "sha256:p.share"

[[claim]]
id = "p.alike"
paper = { arxiv = "1", place = "table 3", tier = "secondary" }
text = { sentence = "Seeds agree.", statistic = "agreement", control = "0", control_kind = "constant" }
bound = { kind = "superiority", margin = 0.1, unit = "tau", from = "planted" }
design = { interval = "jackknife", looks = [5], levels = [0.025], first_seed = 100 }
arms = ["A"]
code = "sha256:p.alike"

[[arm]]
label = "A"
hash = "HASH_A"
rates = [3e-4, 1e-3, 3e-3]
fields = { lr = 1.0, head_lr = 0.1 }

[[arm]]
label = "B"
hash = "HASH_B"
rate_of = "A"
fields = { lr = 1.0 }

[[deviation]]
claim = "p.better"
what = { what = "another number of steps", why = "planted", arms = { B = ["HASH_B", "sha256:other"] } }
"""


def share(table: pd.DataFrame) -> float:
    return float(table["value"].mean())


def alike(one: pd.DataFrame, two: pd.DataFrame) -> float:
    return 1 - abs(float(one["value"].iloc[0] - two["value"].iloc[0]))


PAIRS: Any = {
    "p.better": (Accuracy("A"), Accuracy("B")),
    "p.share": (OfRun(share, "shares", "A"), Constant(1 / 3)),
    "p.alike": (OfPairs(alike, "shares", "A", "A"), Constant(0.0)),
}
METHODS: dict[str, Callable[[float], dict[str, Any]]] = {
    "A": lambda rate: {"name": "lora", "rank": 8, "lr": rate, "head_lr": rate * 0.1},
    "B": lambda rate: {"name": "full", "lr": rate},
}


class Planted:
    """A folder of evidence with its registration and a page, and ``verify`` for them."""

    def __init__(self, root: Path) -> None:
        self.folder, self.registered, self.page = root / "evidence", root / "registered.toml", root / "README.md"

    def registration(self) -> Registration:
        return registration.read(self.registered)

    def blocks(self, evidence: Any, derived: Any) -> dict[str, str]:
        rows = derived.verdicts[["claim", "outcome", "shown"]].astype("object").fillna("").itertuples(index=False)
        return {"verdicts": "".join(f"| {' | '.join(row)} |\n" for row in rows)}

    def verify(self) -> list[str]:
        code: Callable[[str], str] = "sha256:{}".format
        registered, evidence = self.registration(), kept_runs.read(self.folder)
        texts = self.blocks(evidence, derive(evidence, registered, PAIRS))
        found = verify(self.folder, self.registered, registered, PAIRS, code, evidence)
        return [*found, *page_blocks.differences([self.page], texts)]

    def derive(self) -> None:
        derived = derive(kept_runs.read(self.folder), self.registration(), PAIRS)
        write_derived(self.folder, derived, self.registered)

    def manifest(self) -> None:
        (self.folder / "MANIFEST").write_text(full_manifest(self.folder, self.registered))


def write(planted: Planted) -> None:
    text = TOML
    for label in "AB":
        arm = RegisteredArm(label, rates=GRID if label == "A" else (), rate_of="" if label == "A" else "A")
        arm = replace(arm, fields={"lr": 1.0, "head_lr": 0.1} if label == "A" else {"lr": 1.0})
        text = text.replace(f"HASH_{label}", arm_hash(arm, METHODS[label](1e-3), SETTINGS, "task", "w0"))
    planted.registered.parent.mkdir(parents=True, exist_ok=True)
    planted.registered.write_text(text, encoding="utf-8")
    registered, rng = planted.registration(), np.random.default_rng(0)
    for label, role, seed, rate in [
        *(("A", "tuning", 9001, rate) for rate in GRID),
        *((label, "judged", seed, 1e-3) for label in "AB" for seed in range(100, 106)),
    ]:
        margins = np.where(rng.random(ROWS) < {"A": 0.95, "B": 0.4}[label], 9, -9).astype(np.int8)
        row: dict[str, Any] = dict.fromkeys(RUN_COLUMNS, "x") | {
            "run": f"{label}{role}{seed}r{rate}", "arm": label, "arm_hash": registered.arms[label].hash, "role": role,
            "seed": seed, "rate": rate, "steps": 300, "task_hash": "task", "w0": "w0", "dirty": False, "threads": 1,
            "method": json.dumps(METHODS[label](rate)), "settings": json.dumps(SETTINGS), "cpu_seconds": 2.5,
            "trained_parameters": 10, "validation_loss": abs(np.log10(rate) + 3) + 0.25, "validation_metric": 0.8,
            "validation_chance": 0.5, "test_loss": 0.5, "test_metric": float((margins > 0).mean()),
        }  # fmt: skip
        value = rng.uniform(0.5, 0.6)
        kept_runs.add_run(planted.folder, row, {"margin": margins}, {"shares": pd.DataFrame({"value": [value, value]})})
    rows = pd.DataFrame({"task_hash": "task", "row": range(ROWS), "text": "", "label": 0, "group": "g"})
    rows.assign(cluster=[f"c{row // 2}" for row in range(ROWS)]).to_parquet(planted.folder / "rows.parquet")
    planted.derive()
    verdicts = planted.blocks(None, derive(kept_runs.read(planted.folder), registered, PAIRS))["verdicts"]
    planted.page.write_text(
        f"# Page\n<!-- evidence verdicts -->\n{verdicts}<!-- /evidence -->\nEnd.\n", encoding="utf-8"
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    planted = Planted(tmp_path_factory.mktemp("original"))
    write(planted)
    return planted


@pytest.fixture
def planted(original: Planted, tmp_path: Path) -> Planted:
    shutil.copytree(original.folder.parent, tmp_path / "copy")
    return Planted(tmp_path / "copy")


def test_untouched_evidence_agrees(planted: Planted) -> None:
    assert planted.verify() == []
    verdicts = pd.read_csv(planted.folder / "verdicts.csv")
    assert verdicts["outcome"].tolist() == ["supported"] * 3
    assert verdicts["arms_state"].tolist() == ["registered"] * 3
    assert verdicts["n"].tolist() == [5, 5, 5]


def test_files_of_a_run_without_a_row_are_named(planted: Planted) -> None:
    """The last seed can be removed without a gap in the seeds."""
    edit_csv("runs.csv", lambda table: table[table["run"] != "Bjudged105r0.001"])(planted)
    lines = planted.verify()
    for file in ("predictions/Bjudged105r0.001.npz", "kept/shares/Bjudged105r0.001.parquet"):
        assert f"{file}: not a run of runs.csv" in lines


def test_values_name_the_runs_that_they_come_from(planted: Planted) -> None:
    values = pd.read_csv(planted.folder / "values.csv", keep_default_na=False).set_index(["claim", "seed"])
    of = values[["runs_statistic", "runs_control"]]
    assert of.loc["p.better", 103].tolist() == ["Ajudged103r0.001", "Bjudged103r0.001"]
    assert of.loc["p.share", 103].tolist() == ["Ajudged103r0.001", ""]
    pairs = " ".join(f"Ajudged{seed}r0.001" for seed in range(100, 105))
    assert of.loc["p.alike", 103].tolist() == [pairs, ""]


def edit_csv(name: str, change: Callable[[pd.DataFrame], Any]) -> Callable[[Planted], None]:
    def tamper(planted: Planted) -> None:
        file = planted.folder / name
        table = pd.read_csv(file, keep_default_na=False)
        changed = change(table)
        (table if changed is None else changed).to_csv(file, index=False, lineterminator="\n")

    return tamper


def cell(name: str, row: str, column: str, value: Any) -> Callable[[Planted], None]:
    """Change a cell of the first row whose first column starts so."""

    def change(table: pd.DataFrame) -> None:
        at = table.index[table.iloc[:, 0].astype(str).str.startswith(row)][0]
        table[column] = table[column].astype(object)
        table.loc[at, column] = value

    return edit_csv(name, change)


def text(of: str, old: str, new: str) -> Callable[[Planted], None]:
    def tamper(planted: Planted) -> None:
        file = getattr(planted, of)
        content = file.read_text(encoding="utf-8")
        assert old in content
        file.write_text(content.replace(old, new, 1), encoding="utf-8")

    return tamper


def flip_prediction(planted: Planted) -> None:
    file = planted.folder / "predictions" / "Ajudged100r0.001.npz"
    with np.load(file) as arrays:
        margin = arrays["margin"]
    margin[3] *= -1
    np.savez_compressed(file, margin=margin)


def drop_seed(planted: Planted) -> None:
    edit_csv("runs.csv", lambda table: table[table["seed"] != 102])(planted)
    for file in [*planted.folder.rglob("*judged102*")]:
        file.unlink()
    planted.derive()


def judge_a_tuned_seed(planted: Planted) -> None:
    def change(table: pd.DataFrame) -> pd.DataFrame:
        new = table[table["run"] == "Ajudged105r0.001"].assign(run="Ajudged9001", seed=9001)
        return pd.concat([table, new])

    edit_csv("runs.csv", change)(planted)
    planted.derive()


def exchange_runs(planted: Planted) -> None:
    one, two = (planted.folder / "predictions" / f"{run}.npz" for run in ("Ajudged100r0.001", "Bjudged100r0.001"))
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)


def exchange_ids(name: str, column: str) -> Callable[[Planted], None]:
    """Exchange the run ids of two judged runs of one arm in a column of a table."""

    def change(table: pd.DataFrame) -> None:
        first, second = table.index[table[column].astype(str).str.fullmatch("Ajudged10[01]r0.001")][:2]
        table.loc[[first, second], column] = table.loc[[second, first], column].to_numpy()

    return edit_csv(name, change)


def other_arm_field(planted: Planted) -> None:
    changed = json.dumps(METHODS["B"](1e-3) | {"name": "adam"})
    edit_csv("runs.csv", lambda table: table.loc[table["arm"] == "B", ["method"]].pipe(
        lambda _: table.assign(method=table["method"].mask(table["arm"] == "B", changed))
    ))(planted)  # fmt: skip


def of_another_arm(planted: Planted) -> None:
    edit_csv("runs.csv", lambda table: table.assign(
        arm_hash=table["arm_hash"].mask(table["arm"] == "B", "sha256:unknown")
    ))(planted)  # fmt: skip
    planted.derive()


TAMPERED: dict[str, tuple[Callable[[Planted], None], str]] = {
    "a prediction": (flip_prediction, "Ajudged100r0.001: test_metric: kept"),
    "an accuracy": (cell("runs.csv", "Ajudged101", "test_metric", 0.99), "Ajudged101r0.001: test_metric: kept"),
    "a value": (cell("values.csv", "p.share", "statistic", 0.9), "values.csv: row .*p.share 100.: statistic: kept"),
    "an outcome": (cell("verdicts.csv", "p.alike", "outcome", "not supported"), "verdicts.csv: row 4 .*outcome: kept"),
    "a number of seeds": (cell("verdicts.csv", "p.better", "n", 10), "verdicts.csv: row 2 .*: n: kept '10'"),
    "a margin": (text("registered", "margin = 0.1", "margin = 0.01"), "verdicts.csv: row 2 .*bound: kept '0.1'"),
    "a level": (text("registered", "levels = [0.025]", "levels = [0.005]"), "looks must be"),
    "the looks": (
        text("registered", "looks = [5, 10], levels = [0.005, 0.0215]", "looks = [5], levels = [0.025]"),
        "verdicts.csv: row 2 .*level: kept '0.005', recomputed '0.025'",
    ),
    "a chosen rate": (cell("tuning.csv", "A", "chosen", True), "tuning.csv: row 2 .*chosen: kept 'True'"),
    "a tuning loss": (cell("runs.csv", "Atuning9001r0.0003", "validation_loss", 0.1), "judged before a rate of"),
    "a rate": (cell("runs.csv", "Ajudged103", "rate", 3e-3), "Ajudged103r0.001: rate: kept 0.003, chosen 0.001"),
    "a seed dropped": (drop_seed, "arm 'A' on .*: seed 102 is missing"),
    "a tuned seed judged": (judge_a_tuned_seed, "arm 'A': seed 9001 is a tuning seed"),
    "a field of an arm": (other_arm_field, "Bjudged100r0.001: arm_hash: kept"),
    "runs of another arm": (of_another_arm, "claim p.better: its runs are of another arm"),
    "a rate of the method": (
        cell("runs.csv", "Ajudged103", "method", json.dumps(METHODS["A"](3e-3))),
        "Ajudged103r0.001: lr: kept 0.003, the rate gives 0.001",
    ),
    "a number of the page": (text("page", "supported", "not supported"), "README.md:3: block verdicts: kept"),
    "two runs exchanged": (exchange_runs, "Ajudged100r0.001: test_metric: kept"),
    "two ids of a value exchanged": (
        exchange_ids("values.csv", "runs_statistic"),
        "values.csv: row 2 .p.better 100.: runs_statistic: kept 'Ajudged101r0.001', recomputed 'Ajudged100r0.001'",
    ),
    "two ids of runs exchanged": (exchange_ids("runs.csv", "run"), "values.csv: row 2 .*: runs_statistic: kept"),
    "a hash of code": (text("registered", "sha256:p.share", "sha256:old"), "claim p.share: code: kept sha256:old"),
    "arms of a claim": (text("registered", 'arms = ["A", "B"]', 'arms = ["A"]'), "claim p.better: arms: kept"),
    "a kept table": (
        lambda planted: pd.DataFrame({"value": [0.9]}).to_parquet(
            planted.folder / "kept/shares/Ajudged100r0.001.parquet"
        ),
        "values.csv: row .*p.share 100",
    ),
    "a column of a kept table": (
        lambda planted: pd.DataFrame({"other": [0.9]}).to_parquet(
            planted.folder / "kept/shares/Ajudged100r0.001.parquet"
        ),
        "cannot judge p.share from kept/shares: KeyError: 'value'",
    ),
    "texts in a kept table": (
        lambda planted: pd.DataFrame({"value": ["a"]}).to_parquet(
            planted.folder / "kept/shares/Ajudged100r0.001.parquet"
        ),
        "cannot judge p.share from kept/shares: TypeError: ",
    ),
    "rows of a kept table": (
        lambda planted: pd.DataFrame({"value": [0.9]}).head(0).to_parquet(
            planted.folder / "kept/shares/Ajudged100r0.001.parquet"
        ),
        "cannot judge p.share from kept/shares: values must be finite",
    ),
    "all clusters but one": (
        lambda planted: pd.read_parquet(planted.folder / "rows.parquet").assign(cluster="c").to_parquet(
            planted.folder / "rows.parquet"
        ),
        "cannot judge p.better from predictions: rows.parquet must have two or more clusters of test rows",
    ),
    "a number of steps": (
        cell("runs.csv", "Ajudged101", "steps", 30),
        "Ajudged101r0.001: steps: kept 30, the settings give 300",
    ),
    "a perplexity": (
        edit_csv("runs.csv", lambda table: table.assign(validation_chance="")),
        "Ajudged101r0.001: validation_metric: kept 0.8, exp.validation_loss. gives 1.28",
    ),
    "a method that is not JSON": (cell("runs.csv", "Ajudged103", "method", "{"), "Ajudged103r0.001: method as JSON"),
    "a method that is a list": (cell("runs.csv", "Ajudged103", "method", "[]"), "Ajudged103r0.001: method: Expected"),
    "settings without text": (cell("runs.csv", "Ajudged103", "settings", ""), "Ajudged103r0.001: settings as JSON"),
    "a method without a rate": (
        cell("runs.csv", "Ajudged103", "method", '{"name": "lora"}'),
        "Ajudged103r0.001: lr: kept None, the rate gives 0.001",
    ),
    "a field more in a row": (
        lambda planted: (planted.folder / "values.csv").write_bytes(
            (planted.folder / "values.csv").read_bytes().replace(b"\n", b",x\n", 2).replace(b",x\n", b"\n", 1)
        ),
        "values.csv: row 2 must have 10 fields, got 11",
    ),
    "a byte": (
        lambda planted: (planted.folder / "verdicts.csv").write_bytes(b"claim\n\xff\n"),
        "verdicts.csv: 'utf-8' codec can't decode",
    ),
    "an empty file": (
        lambda planted: (planted.folder / "tuning.csv").write_bytes(b""),
        "tuning.csv: it has no columns",
    ),
    "a file removed": (lambda planted: (planted.folder / "values.csv").unlink(), "values.csv: no such file"),
    "a row removed": (edit_csv("values.csv", lambda table: table[1:]), "values.csv: kept .* rows"),
}  # fmt: skip


@pytest.mark.parametrize("manifest", ["as it was", "rewritten"])
@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_is_named(planted: Planted, name: str, manifest: str) -> None:
    tamper, place = TAMPERED[name]
    tamper(planted)
    if manifest == "rewritten":
        planted.manifest()
    try:
        lines = planted.verify()
    except ValueError as error:  # the registration is refused, or a claim cannot be judged
        lines, manifest = [str(error)], "not read"
    assert any(pd.Series([line]).str.contains(place, regex=True).item() for line in lines), lines
    assert all("\n" not in line for line in lines)
    if manifest == "as it was" and name != "a number of the page":
        file = {"a margin": "registered.toml"}.get(name, "")
        assert any(line.startswith("MANIFEST") and file in line for line in lines) or name in RECOMPUTED


RECOMPUTED = {"a seed dropped", "a tuned seed judged", "runs of another arm"}  # written with their manifest


def test_best_accuracy_and_epochs_of_a_course_agree_with_the_run(original: Planted) -> None:
    evidence = kept_runs.read(original.folder)
    run = evidence.run("A", 100)
    runs = evidence.runs[evidence.runs["run"] == run].assign(settings="{}", test_metric=0.75, steps=40)
    for best, epochs, lines in [
        (0.75, 40, []),
        (0.8, 40, []),  # the accuracy fell after its best epoch
        (0.7, 40, [f"runs.csv: {run}: test_metric: kept 0.75, above best_accuracy of kept/course: 0.7"]),
        (0.8, 50, [f"runs.csv: {run}: steps: kept 40, epochs of kept/course: 50"]),
    ]:
        course = pd.DataFrame({"best_accuracy": [best], "epochs": [epochs]})
        checked = kept_runs.Evidence(runs, evidence.rows, kept={COURSE: {run: course}})
        assert list(verification._check_scores(checked)) == lines
    for damaged in (course[["epochs"]], course.astype(str) + "x", course.head(0)):
        checked = kept_runs.Evidence(runs, evidence.rows, kept={COURSE: {run: damaged}})
        (line,) = verification._check_scores(checked)
        assert line.startswith(f"kept/{COURSE}/{run}.parquet: ")


def test_registered_deviation_is_marked_for_good_and_its_removal_is_found(planted: Planted) -> None:
    edit_csv("runs.csv", lambda table: table.assign(
        arm_hash=table["arm_hash"].mask(table["arm"] == "B", "sha256:other")
    ))(planted)  # fmt: skip
    planted.derive()
    assert pd.read_csv(planted.folder / "verdicts.csv")["arms_state"].tolist() == [
        "deviated",
        "registered",
        "registered",
    ]
    planted.registered.write_text(planted.registered.read_text().split("[[deviation]]")[0])
    planted.manifest()
    lines = planted.verify()
    assert "registered.toml: claim p.better: its runs are of another arm than registered" in lines
    assert any("arms_state: kept 'deviated', recomputed 'changed'" in line for line in lines)


def test_page_is_written_from_the_evidence(planted: Planted) -> None:
    text("page", "supported", "not supported")(planted)
    derived = derive(kept_runs.read(planted.folder), planted.registration(), PAIRS)
    page_blocks.write(planted.page, planted.blocks(None, derived))
    assert planted.verify() == []
    assert planted.page.read_text().startswith("# Page\n<!-- evidence verdicts -->\n| p.better | supported |")
    text("page", "evidence verdicts", "evidence other")(planted)
    assert planted.verify() == [f"{planted.page}:2: unknown block 'other', expected one of verdicts", MISSING]
    text("page", "<!-- /evidence -->", "")(planted)
    assert planted.verify() == [f"{planted.page}:2: block 'other' has no end", MISSING]


MISSING = "README.md or docs: block 'verdicts' is missing"


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("<!-- evidence verdicts -->", "<!-- evidence  verdicts -->", 2),
        ("<!-- evidence verdicts -->", "<!--evidence verdicts-->", 2),
        ("<!-- evidence verdicts -->", "<!-- Evidence verdicts -->", 2),
        ("<!-- evidence verdicts -->", "<!-- evidence verdicts --> ", 2),
        ("<!-- evidence verdicts -->\n", "", 5),
        ("<!-- /evidence -->", "<!-- / evidence -->", 2),
    ],
)
def test_damaged_marker_is_named(planted: Planted, old: str, new: str, line: int) -> None:
    text("page", old, new)(planted)
    lines = planted.verify()
    assert lines[0].startswith(f"{planted.page}:{line}: ")
    assert (MISSING in lines) == (old != "<!-- /evidence -->")


def test_block_without_markers_and_block_on_two_pages_are_named(planted: Planted) -> None:
    text("page", "End.", planted.page.read_text().partition("\n")[2])(planted)
    assert planted.verify() == [f"{planted.page}:7: block 'verdicts' occurs twice"]
    planted.page.write_text("# Page\n", encoding="utf-8")
    assert planted.verify() == [MISSING]
