"""Verification of the second edition: an untouched folder agrees, and every tampering is named by its cause."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from made_up_study import around, comparisons, made_up, planted, registration

from lorascope.cli import verify as verify_command
from lorascope.papers import registry
from lorascope.papers.judging import beliefs, kept_study, registered_study, study_verification
from lorascope.papers.judging.code_hash import comparison_hash, judging_hash
from lorascope.papers.judging.kept_study import STUDY_COLUMNS, StudyEvidence
from lorascope.papers.judging.study_statistics import effect_interval
from lorascope.papers.judging.study_verification import verify_study, write_study
from lorascope.papers.judging.words import word

IDS = ("gain", "text")
COMPARISONS = {id: planted(comparison) for id, comparison in comparisons().items() if id in IDS}
EFFECTS = {"gain": {"for": 6.0, "against": 0.0, "positive": 6.0}, "text": {"for": 0.0, "positive": -3.0}}
TUNED = "AdaLoRA, uneven"


def made_up_evidence(registered: Any) -> StudyEvidence:
    """Return evidence of a pair and of a claim on text, with losses and with tuning runs of one arm."""
    pieces = []
    for id, by_name in EFFECTS.items():
        effects = {}
        for number, (name, effect) in enumerate(by_name.items()):
            count = 5 if (id, name) == ("text", "positive") else 16
            effects[name] = around(effect, 0.1, count, number)
        pieces.append(made_up(registered, id, COMPARISONS[id], effects))
    tuning = []
    for rate, gap in ((1e-3, 0.3), (1.8e-3, 0.2), (3.2e-3, 0.4)):
        for seed in (9001, 9002, 9003):
            run = f"t{seed}-{rate}"
            row = {"run": run, "arm": TUNED, "role": "tuning", "seed": seed, "rate": rate, "gap": gap, "base_gap": 1.0}
            tuning.append(row)
    runs = pd.concat([piece.runs for piece in pieces], ignore_index=True)
    runs.loc[runs["arm"] == TUNED, "rate"] = 1.8e-3
    empty = {"arm_hash": "sha256:1", "phase": "", "task": "", "commit": "", "processor": "", "capability": ""}
    of_tuning = pd.DataFrame(tuning).assign(**empty, torch="", device="", threads=1, cpu_seconds=60.0)
    runs = pd.concat([runs, of_tuning.reindex(columns=list(STUDY_COLUMNS))], ignore_index=True)
    losses = runs[["arm", "seed", "run"]].assign(phase="", step=0, loss=np.float16(0.5))
    return replace(pieces[1], runs=runs, tables={"losses": losses}, _tables_by_run={})


# The registration has one paper.
BELIEF = """
[[belief]]
paper = "AdaLoRA"
arxiv = "2303.10512"
sentence = "Gains 6.0 points where ranks differ, and -0.0 where they do not; costs 0.00 on text."
words = { gain = "as claimed", text = "no cost" }
numbers = ["gain effect", "gain against_effect", "-text effect"]
"""


def to_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {to_toml(entry)}" for name, entry in value.items()) + " }"
    return json.dumps(value)


def write_registration(file: Path, registered: Any) -> None:
    lines = ["edition = 2", f'judging = "{judging_hash()}"']
    for name, entries in (("arm", registered.arms), ("claim", registered.claims)):
        for entry in entries.values():
            fields = msgspec.to_builtins(entry)
            if name == "claim" and fields["paper"]["printed"] is None:
                del fields["paper"]["printed"]
            lines += [f"[[{name}]]", *(f"{key} = {to_toml(value)}" for key, value in fields.items())]
    file.write_text("\n".join(lines), "utf-8")


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of a folder of evidence and of its registration."""
    data = tmp_path_factory.mktemp("data")
    registered = registration(COMPARISONS)
    rates = msgspec.structs.replace(registered.arms[TUNED], rates=(1e-3, 1.8e-3, 3.2e-3))
    registered = replace(registered, arms={**registered.arms, TUNED: rates})
    with_code = {id: msgspec.structs.replace(c, code=f"sha256:{id}") for id, c in registered.claims.items()}
    write_registration(data / "registered-2.toml", replace(registered, claims=with_code))
    kept_study.write(data / "evidence-2", made_up_evidence(registered))
    write_study(data / "evidence-2", data / "registered-2.toml", COMPARISONS)
    (data / "evidence-2" / "beliefs.toml").write_text(BELIEF, "utf-8")
    return {path.relative_to(data).as_posix(): path.read_bytes() for path in data.rglob("*") if path.is_file()}


@pytest.fixture
def data(contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(study_verification, "comparison_hash", lambda module, id: f"sha256:{id}")
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def verify(data: Path) -> list[str]:
    return verify_study(data / "evidence-2", data / "registered-2.toml", COMPARISONS, lambda id: "papers")


def test_an_untouched_folder_agrees(data: Path) -> None:
    assert verify(data) == []
    results = pd.read_csv(data / "evidence-2" / "results.csv").set_index("claim")
    assert results["word"].to_dict() == {"gain": "gain", "text": "no cost"}
    assert results.loc["gain", "pair"] == "as claimed"


def test_processors_of_a_deviation_count_as_one(data: Path) -> None:
    set_value("LoRA, even", 204, "processor", "other")(data / "evidence-2")
    deviation = (
        '\n[[deviation]]\nclaims = ["{}"]\nchange = "two processors"\nreason = "equal bits"\nprocessors = ["", "{}"]\n'
    )
    file = data / "registered-2.toml"
    registered = file.read_text()
    line = "runs.csv.gz: claim gain: arms of against have different machines with seed 204"
    for claim, processor, expected in (("gain", "other", []), ("gain", "third", [line]), ("text", "other", [line])):
        file.write_text(registered + deviation.format(claim, processor))
        write_study(data / "evidence-2", file, COMPARISONS)
        assert [line for line in verify(data) if "machines" in line] == expected, (claim, processor)


@pytest.mark.parametrize(("missing", "expected"), [([214, 215], []), ([207], [207])])
def test_last_seeds_are_open_until_a_claim_is_judged(data: Path, missing: list[int], expected: list[int]) -> None:
    edit_runs(lambda runs: runs[(runs["arm"] != "LoRA, even") | ~runs["seed"].isin(missing)])(data / "evidence-2")
    write_study(data / "evidence-2", data / "registered-2.toml", COMPARISONS)
    lines = [line for line in verify(data) if line.startswith("runs.csv.gz")]
    assert lines == [
        f"runs.csv.gz: arm 'LoRA, even': 15 of 16 judged seeds, seed {seed} is missing" for seed in expected
    ]


def edit_runs(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        file = folder / "runs.csv.gz"
        runs = change(kept_study.read(folder).runs)
        file.write_bytes(gzip.compress(runs.to_csv(index=False, lineterminator="\n").encode()))

    return tamper


def set_value(arm: str, seed: int, column: str, value: Any) -> Callable[[Path], None]:
    def change(runs: pd.DataFrame) -> pd.DataFrame:
        runs.loc[(runs["arm"] == arm) & (runs["seed"] == seed), column] = value
        return runs

    return edit_runs(change)


def without_last_seed(runs: pd.DataFrame) -> pd.DataFrame:
    return runs[(runs["arm"] != "LoRA, even") | (runs["seed"] != 215)]


def flip_bit(folder: Path) -> None:
    evidence = kept_study.read(folder)
    run = evidence.run("full", 207)
    bits = {**evidence.right, run: evidence.right[run] ^ np.eye(1, len(evidence.right[run]), 5, dtype=np.uint8)[0]}
    kept_study.write(folder, replace(evidence, right=bits))


def change_loss(folder: Path) -> None:
    evidence = kept_study.read(folder)
    losses = evidence.tables["losses"].copy()
    losses.loc[3, "loss"] = np.float16(0.25)
    kept_study.write(folder, replace(evidence, tables={"losses": losses}))


def edit_text(name: str, before: str, after: str) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        text = (folder / name).read_text("utf-8")
        assert before in text
        (folder / name).write_text(text.replace(before, after, 1), "utf-8")

    return tamper


def change_effect(folder: Path) -> None:
    effects = pd.read_csv(folder / "effects.csv")
    effects.loc[3, "effect"] += 1e-3
    effects.to_csv(folder / "effects.csv", index=False, lineterminator="\n")


TAMPERINGS: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    # What is changed, a text in the only line on the cause, and whether other differences follow.
    "gap": (set_value("LoRA, even", 204, "gap", 0.3), "runs.csv.gz: differs from MANIFEST", True),
    "rate": (set_value(TUNED, 204, "rate", 3.2e-3), "seed 204: rate 0.0032, chosen 0.0018", True),
    "hash": (set_value("LoRA, even", 204, "arm_hash", "sha256:2"), "arm 'LoRA, even': hash", True),
    "arm": (set_value("LoRA, even", 204, "processor", "other"), "different machines with seed 204", True),
    "last seed": (edit_runs(without_last_seed), "15 of 16 judged seeds, seed 215 is missing", True),
    "tuning": (set_value(TUNED, 9001, "gap", 0.25), "runs.csv.gz: differs from MANIFEST", True),
    "bit": (flip_bit, "right.npz: run ", True),
    "loss": (change_loss, "losses.parquet: differs from MANIFEST", False),
    "effect": (change_effect, "effects.csv: row 5 (gain for): effect", False),
    "word": (edit_text("results.csv", "as claimed", "not only there"), "results.csv: row 2 (gain 16): pair", False),
    "bound": (edit_text("../registered-2.toml", "bound = 2.0", "bound = 0.2"), "registered-2.toml: differs", False),
    "registered rate": (edit_text("../registered-2.toml", "0.0018", "0.0019"), "registered-2.toml: differs", True),
    "registered arms": (
        edit_text("../registered-2.toml", '"LoRA, even"]', '"oracle, uneven"]'), "arms of against: registered", True
    ),
    "missing beliefs": (lambda folder: (folder / "beliefs.toml").unlink(), "beliefs.toml: no such file", False),
    "missing file": (lambda folder: (folder / "results.csv").unlink(), "results.csv: no such file", False),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_gives_one_line_for_its_cause(name: str, data: Path) -> None:
    tamper, cause, has_consequences = TAMPERINGS[name]
    tamper(data / "evidence-2")
    lines = verify(data)
    assert cause in lines[0], lines
    assert len(lines) == 1 + has_consequences, lines
    if has_consequences:
        assert lines[-1].endswith("in what follows from these")


BELIEF_TAMPERINGS = {
    # Text of the sentence or of what it relies on, another one, and the only difference.
    "word": ('"no cost"', '"cost"', "text is 'no cost', the sentence relies on 'cost'"),
    "number": ("6.0", "6.1", "gain effect is 6.0, the sentence has 6.1"),
    "sign": ("6.0", "-6.0", "gain effect is 6.0, the sentence has -6.0"),
    "further number": ("on text", "on 0.5 text", "numbers must have one place per number"),
    "number of no claim": ('"-text effect"', '"-table effect"', "numbers must name a claim of words"),
    "length": ("on text", "on text" + " again" * 12, "the sentence must have at most 25 words, got 28"),
    "claim": ("{ gain", '{ gains = "gain", gain', "gains has no result"),
    "paper": ("2303.10512", "2303.1", "must have one sentence per paper: 2303.10512"),
    "syntax": ("[[belief", "[[belief[", "cannot read "),
}


@pytest.mark.parametrize("name", BELIEF_TAMPERINGS)
def test_a_sentence_that_its_results_do_not_support_is_named(name: str, data: Path) -> None:
    before, after, cause = BELIEF_TAMPERINGS[name]
    edit_text("beliefs.toml", before, after)(data / "evidence-2")
    (line,) = verify(data)
    assert cause in line
    assert "beliefs.toml" in line


def test_a_sentence_must_rely_on_the_claims_of_the_headline(data: Path) -> None:
    registered = registered_study.read(data / "registered-2.toml")
    claim = registered.claims["gain"]
    headline = msgspec.structs.replace(claim, rule=msgspec.structs.replace(claim.rule, headline=True))
    registered = replace(registered, claims={**registered.claims, "gain": headline})
    edit_text("beliefs.toml", 'gain = "as claimed", ', "")(data / "evidence-2")
    results = (data / "evidence-2" / "results.csv").read_bytes()
    lines = list(beliefs.belief_differences(data / "evidence-2", registered, results))
    assert "AdaLoRA: words must have gain, a claim of the headline" in lines[0]


def test_a_changed_formula_is_noticed(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_verification, "judging_hash", lambda: "sha256:other")
    assert len(lines := verify(data)) == 1
    assert "judging: registered sha256:" in lines[0]


def test_the_command_verifies_both_editions(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_command.registered_study, "STUDY_FILE", data / "registered-2.toml")
    monkeypatch.setattr(verify_command, "COMPARISONS", COMPARISONS)
    monkeypatch.setattr(verify_command, "module_of", lambda id: "papers")
    assert verify_command._verify_second(write=False) == []
    change_effect(data / "evidence-2")
    assert len(verify_command._verify_second(write=False)) == 1
    assert verify_command._verify_second(write=True) == []


def test_a_damaged_file_gives_one_line(data: Path) -> None:
    (data / "evidence-2" / "right.npz").write_bytes(b"no archive")
    assert len(lines := verify(data)) == 1
    assert "right.npz" in lines[0]


def test_every_comparison_has_a_hash() -> None:
    for id in getattr(registry, "COMPARISONS", {}):
        assert comparison_hash(registry.module_of(id), id).startswith("sha256:")


def test_judging_hash_covers_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorascope.papers.judging import code_hash

    reached: dict[str, str] = {}
    for module, function in code_hash._JUDGING:
        code_hash._resolve([function], module, reached, code_hash._PART_OF_JUDGING)
    names = {name.rpartition(".")[2] for name in reached}
    expected = {"word", "pair_word", "has_headroom", "are_learned", "effect_interval", "t_estimate", "two_way_estimate"}
    expected |= {"StudyEvidence", "choose_safe_rate", "number_of_seeds", "grid_rate", "MIN_CLOSED", "TUNING_SEEDS"}
    assert expected <= names


def recompute() -> Any:
    """Import ``docs/recompute.py``, which uses nothing of the package."""
    spec = importlib.util.spec_from_file_location("recompute", Path(__file__).parents[1] / "docs" / "recompute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recomputed_intervals_by_hand_and_as_the_package_computes_them() -> None:
    module, rng = recompute(), np.random.default_rng(3)
    differences = np.array([[1, 0, -1, 0], [1, 1, 0, 0], [0, 0, 0, 1]], float)
    mean, low, high = module.two_way_interval(differences, [0, 0, 1, 2])
    assert (mean, (high - low) / 2) == (pytest.approx(0.25), pytest.approx(1.01810, abs=5e-6))
    for _ in range(20):
        values, clusters = rng.integers(-1, 2, (5, 30)).astype(float), rng.integers(0, 12, 30)
        expected = effect_interval(values, pd.factorize(clusters)[0])
        np.testing.assert_allclose(module.two_way_interval(values, clusters), expected[:3], rtol=1e-9)
        np.testing.assert_allclose(module.interval(values[:, 0]), effect_interval(values[:, 0])[:3], rtol=1e-9)
        for kind in ("gain", "cost"):
            low, high = sorted(rng.uniform(-3, 3, 2))
            assert module.word(kind, 1.5, low, high) == word(kind, 1.5, low, high)  # type: ignore[arg-type]


def test_recomputed_results_are_those_kept(data: Path) -> None:
    for name in ("registered-2.toml", "evidence-2/effects.csv"):
        text = (data / name).read_text("utf-8")
        text = text.replace('id = "gain"', 'id = "pair.x"').replace("gain,", "pair.x,")
        # The first arm is the method.
        text = (
            text.replace('["full", "LoRA"]', '["LoRA", "full"]')
            .replace('"text"', '"text.x"')
            .replace("text,", "text.x,")
        )
        (data / name).write_text(text, "utf-8")
    table = recompute().results(data / "evidence-2", data / "registered-2.toml")
    kept = pd.read_csv(data / "evidence-2" / "results.csv")
    assert table["claim"].tolist() == ["pair.x", "text.x"]
    assert table["word"].tolist() == kept["word"].tolist()
    assert table["pair"].tolist() == kept["pair"].fillna("").tolist() == ["as claimed", ""]
    columns = ["n", "effect", "low", "high"]
    np.testing.assert_allclose(table[columns], kept[columns], rtol=1e-9, atol=1e-9)
