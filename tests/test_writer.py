"""Writing of files to a disk or server that fails temporarily."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from planted import manifest
from test_loading import META

from lorascope.files import whole_files
from lorascope.files.whole_files import write_bytes, write_json
from lorascope.runs.loading import load
from lorascope.runs.writer import RunWriter
from lorascope.schema.records import Factors, Record


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Return a function that makes the next ``times`` writes fail with a system error."""
    monkeypatch.setattr(whole_files, "PAUSES", (0.0, 0.0))

    def fail(times: int, number: int) -> None:
        left = [times]

        def sync(handle: int) -> None:
            left[0] -= 1
            if left[0] >= 0:
                raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", sync)

    return fail


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOENT])
def test_write_bytes_retries_transient_errors_of_a_network_file_system(failing, tmp_path: Path, number: int) -> None:
    failing(2, number)
    with pytest.warns(UserWarning, match=r"cannot write .*file: .*retrying") as told:
        write_bytes(tmp_path / "file", b"whole")
    assert len(told) == 2
    assert (tmp_path / "file").read_bytes() == b"whole"
    failing(3, number)
    with pytest.warns(UserWarning, match="retrying"), pytest.raises(OSError, match=r"cannot write .*file") as caught:
        write_bytes(tmp_path / "file", b"other")
    assert caught.value.errno == number
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"whole"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_write_bytes_does_not_retry_permanent_errors(failing, tmp_path: Path, number: int) -> None:
    failing(1, number)
    with pytest.raises(OSError, match=r"cannot write .*file") as caught:
        write_bytes(tmp_path / "file", b"whole")
    assert caught.value.errno == number
    assert not any(tmp_path.iterdir())


def test_write_bytes_follows_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "file").symlink_to("scratch/file")
    write_bytes(tmp_path / "file", b"whole")
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "scratch/file").read_bytes() == b"whole"


def test_write_json_preserves_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"Gr\xf6\xdfe")
    write_json(tmp_path / "x.json", {"model": name, "label": "Größe τ"})
    assert '"Größe τ"'.encode() in (tmp_path / "x.json").read_bytes()
    assert json.loads((tmp_path / "x.json").read_bytes()) == {"model": name, "label": "Größe τ"}


def test_run_writer_writes_failed_arrays_with_the_next_ones(failing, tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", manifest(**META))
    factors = [Factors("h.0.q", {"A": np.eye(2, 3) * step, "B": np.eye(3, 2)}, 1.0) for step in range(3)]
    writer.collect(0, [Record("update_norm", 1.0, "h.0.q"), factors[0]])
    writer.write_arrays()
    failing(1, errno.ENOSPC)
    writer.collect(1, [Record("update_norm", 2.0, "h.0.q"), factors[1]])
    with pytest.raises(OSError, match="No space left"):
        writer.write_arrays()
    writer.collect(2, [factors[2]])
    run = writer.finish("done")
    assert run.table["value"].tolist() == [1.0, 2.0]
    for step in range(3):
        np.testing.assert_array_equal(load(tmp_path / "run").factors(step)["h.0.q"]["A"], np.eye(2, 3) * step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_json(tmp_path / "run" / "unwarned.json", {})
