"""Registration of the claims: what the file holds, and one line for what it must not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from lorascope.papers.judging import registration
from lorascope.papers.judging.registration import FILE, RegisteredArm, arm_hash

REGISTERED = registration.read()


def test_every_paper_has_one_primary_claim() -> None:
    primary = [claim.paper.arxiv for claim in REGISTERED.of_tier("primary").values()]
    judged = {claim.paper.arxiv for claim in REGISTERED.of_tier("primary", "secondary").values()}
    assert len(primary) == 9
    assert set(primary) == judged


def test_counts_of_the_registration() -> None:
    judged = REGISTERED.of_tier("primary", "secondary")
    assert Counter(claim.paper.tier for claim in REGISTERED.claims.values()) == {
        "primary": 9, "secondary": 79, "published": 7
    }  # fmt: skip
    assert Counter(claim.claim.kind for claim in judged.values()) == {
        "superiority": 79, "non-inferiority": 7, "equivalence": 2
    }  # fmt: skip
    assert len({id for claim in judged.values() for id in claim.earlier}) == 70


def test_first_seed_is_none_that_was_looked_at_before() -> None:
    assert {claim.design.first_seed for claim in REGISTERED.of_tier("primary", "secondary").values()} == {100}


def test_arms_without_claims_have_a_number_of_seeds() -> None:
    used = {label for claim in REGISTERED.claims.values() for label in claim.arms}
    for label, arm in REGISTERED.arms.items():
        assert (arm.seeds > 0) == (label not in used)
    arm = RegisteredArm("LoRA", rates=(1e-3,))
    assert arm_hash(arm, {}, {}, "task", "w0") == arm_hash(replace(arm, seeds=3), {}, {}, "task", "w0")


def changed(folder: Path, old: str, new: str) -> Path:
    text = FILE.read_text(encoding="utf-8")
    assert old in text
    file = folder / "registered.toml"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tolerance = 0.01", "tolerance = 0", "tolerance must be a finite number > 0, got 0.0: claim lora.parity"),
        ("tolerance = 0.01", 'tolerance = "x"', "registered.toml: Expected `float | null`, got `str`"),
        (
            "tolerance = 0.01",
            "tolerance = 0.01, margin = 0.01",
            "margin must be left out of a claim of non-inferiority",
        ),
        ("tolerance = 0.01", "tolerance = 0.01, tolerence = 0.02", "unknown key 'tolerence'. Correct or remove it"),
        ("tuning_seeds =", "tuning_seed =", "unknown key 'tuning_seed'"),
        ("[[stage]]", "[[stages]]", "unknown key 'stages'"),
        ("looks = [5, 10, 20]", "looks = [5, 10, 30]", r"looks must be .* got \[5, 10, 30\]"),
        ("[0.005, 0.0075, 0.015]", "[0.005, 0.0075, 0.02]", r"looks must be .* at \[0.005, 0.0075, 0.02\]"),
        ('id = "lora.words"', 'id = "lora.parity"', "claim 'lora.parity' is registered twice"),
        ('tier = "primary"', 'tier = "first"', "Invalid enum value 'first'"),
        ('kind = "non-inferiority"', 'kind = "parity"', "Invalid enum value 'parity'"),
        ("[[claim]]", "[[claim]", "cannot read"),
        (
            'rate_of = "LoRA, rank 4"',
            'rate_of = "LoRA"',
            "arm 'ALoRA.*' names the arm 'LoRA', which is not registered",
        ),
        ('arms = ["', 'arms = ["X, ', "claim 'lora.parity' names the arm 'X, .*', which is not registered"),
    ],
)
def test_other_registrations_are_refused_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        registration.read(changed(tmp_path, old, new))
    assert "\n" not in str(raised.value)


def test_hash_of_an_arm_leaves_out_rate_and_label() -> None:
    arm = RegisteredArm("LoRA", rates=(1e-3, 3e-3), fields={"lr": 1.0, "head_lr": 0.1})
    method, settings = {"name": "lora", "rank": 8, "lr": 1e-3, "head_lr": 1e-4}, {"steps": 300}
    found = arm_hash(arm, method, settings, "task", "w0")
    assert found == arm_hash(
        RegisteredArm("other", rates=arm.rates, fields=arm.fields), method | {"lr": 9.0}, settings, "task", "w0"
    )
    for other in (
        arm_hash(arm, method | {"rank": 9}, settings, "task", "w0"),
        arm_hash(arm, method, {"steps": 301}, "task", "w0"),
        arm_hash(arm, method, settings, "another", "w0"),
        arm_hash(arm, method, settings, "task", "another"),
        arm_hash(RegisteredArm("LoRA", rates=(1e-3,), fields=arm.fields), method, settings, "task", "w0"),
        arm_hash(RegisteredArm("LoRA", rates=arm.rates, fields={"lr": 1.0}), method, settings, "task", "w0"),
    ):
        assert other != found
