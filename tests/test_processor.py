"""Model of the processor, from what Linux lists of x86 and ARM, and from Python elsewhere."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from lorascope.training import processor

X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
stepping\t: 1
cpu MHz\t\t: 2596.098
flags\t\t: fpu avx2

processor\t: 1
model name\t: another
"""
ARM = """processor\t: 0
BogoMIPS\t: 243.75
CPU implementer\t: 0x41
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1
"""


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (X86, "AMD EPYC, cpu family 26, model 2, stepping 1"),
        (ARM, "CPU implementer 0x41, CPU variant 0x3, CPU part 0xd0c, CPU revision 1"),
        ("model name\t: Intel(R) Xeon(R) CPU @ 2.20GHz\n", "Intel(R) Xeon(R) CPU @ 2.20GHz"),
        ("processor\t: 0\n", "from Python"),
        (None, "from Python"),
    ],
)
def test_processor_name_is_the_model_without_what_changes_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str | None, expected: str
) -> None:
    file = tmp_path / "cpuinfo"
    if listed is not None:
        file.write_text(listed)
    monkeypatch.setattr(processor, "_LISTING", file)
    monkeypatch.setattr(platform, "processor", lambda: "from Python")
    processor.processor_name.cache_clear()
    assert processor.processor_name() == expected
    processor.processor_name.cache_clear()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux lists its processors")
def test_processor_of_this_machine_is_listed() -> None:
    listing = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    first, *others = processor.processor_name().split(", ")
    assert f": {first}\n" in listing or not others
    assert all(other.rpartition(" ")[2] in listing for other in others)
