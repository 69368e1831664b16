"""Adapters by name on the hub, against a local server that answers as the hub does."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from contract.format_rows import Q, V, lora
from test_series import write

from lorascope.files.hub import HubName, label, locate, model_name, parse_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Each name is loaded, and its label or the error is printed; the second part counts the requests that came meanwhile.
LOAD = """
import json, sys
import lorascope as ls
for name in sys.argv[1:]:
    try:
        found = ls.load(name)
        print(json.dumps([found.label, list(found.updates())]))
    except (ValueError, FileNotFoundError) as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


class Hub:
    """Server with repositories as mappings from file names to contents; "gated" and "private" repositories refuse.

    A key ``repository@revision`` has the contents of that revision. ``pushed`` maps a repository to the revisions that
    successive requests for its branch main get; the last one stays. After ``silent_after`` requests there is only what
    ``after`` says: nothing, one byte, headers that come slowly, a body that comes slowly, or one that does not end.
    """

    silent_after: int | None = None
    after = ""

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        self.repositories, self.requested = repositories, []
        self.pushed: dict[str, list[str]] = {}
        revisions = [key.partition("@")[2] for key in repositories if "@" in key]
        self.commits = {hashlib.sha1(revision.encode()).hexdigest(): revision for revision in revisions}
        self.stopped = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                hub.requested.append(self.path)
                if hub.silent_after is not None and len(hub.requested) > hub.silent_after:
                    self.answer_badly()
                    return
                path = self.path.partition("?")[0].strip("/")
                api = path.startswith("api/models/")
                repository = "/".join(path.removeprefix("api/models/").split("/")[:2])
                files = hub.repositories.get(repository)
                rest = path.partition(f"{repository}/")[2]
                revision = rest.split("/")[1] if "/" in rest else "main"
                content, commit = None, COMMIT
                revision = hub.commits.get(revision, revision)
                if revision == "main" and (pushed := hub.pushed.get(repository)):
                    revision = pushed.pop(0) if len(pushed) > 1 else pushed[0]
                if (own := hub.repositories.get(f"{repository}@{revision}")) is not None:
                    files, commit = own, hashlib.sha1(revision.encode()).hexdigest()
                if files is None:
                    status, code = 404, "RepoNotFound"
                elif repository.startswith("gated/"):
                    status, code = 403, "GatedRepo"
                elif own is None and revision not in ("main", "v1", COMMIT):
                    status, code = 404, "RevisionNotFound"
                elif api:
                    status, code = 200, ""
                    siblings = [{"rfilename": name} for name in files]
                    entries = [
                        {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                        for name, data in files.items()
                    ]
                    about = {"id": repository, "sha": commit, "siblings": siblings, "private": False, "tags": []}
                    content = json.dumps(entries if rest.startswith("tree") else about).encode()
                else:
                    content = files.get(rest.partition("/")[2].partition("/")[2])
                    status, code = (200, "") if content is not None else (404, "EntryNotFound")
                self.send_response(status)
                self.send_header("X-Repo-Commit", commit)
                if code:
                    self.send_header("X-Error-Code", code)
                if content is not None:
                    self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                if body and content is not None:
                    self.wfile.write(content)

            def answer_badly(self) -> None:
                if hub.after == "slow headers":
                    with contextlib.suppress(OSError):  # the client has closed the connection
                        for number in itertools.count():
                            self.wfile.write(b"HTTP/1.1 200 OK\r\n" if not number else b"X: 0\r\n")
                            if hub.stopped.wait(0.2):
                                break
                    return
                if not hub.after.endswith("body"):
                    self.wfile.write(hub.after.encode())
                    hub.stopped.wait()
                    return
                self.send_response(200)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{"0" * 64}"')
                if hub.after == "slow body":
                    self.send_header("Content-Length", "1000")
                self.end_headers()
                with contextlib.suppress(OSError):  # the client has closed the connection
                    while self.command == "GET" and not hub.stopped.wait(0.1 * (hub.after == "slow body")):
                        self.wfile.write(b"0" if hub.after == "slow body" else b"0" * 2**16)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()

    def run(self, home: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        own = {"HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}", "HF_HOME": str(home)}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | own | env
        return subprocess.run(
            [sys.executable, *words], env=environment, cwd=home, capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub") / "adapter"
    lora(folder, folder)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    weights = files["adapter_model.safetensors"]
    steps = {}
    for step in (100, 200):
        other = folder.with_name(f"step-{step}")
        write(other, {Q: (np.full((4, 1), step), np.ones((1, 5)))})
        steps[f"someone/adapter@step-{step}"] = {file.name: file.read_bytes() for file in other.iterdir()}
    inside = {f"final/{name}": data for name, data in files.items()}
    found = Hub({
        "someone/adapter": files | {"pytorch_model.bin": b"whole model", "training_args.bin": b"\x80pickle"},
        "someone/nested": inside | {"README.md": b"text"},
        "someone/file": {"my-lora.safetensors": weights, "preview.png": b"png"},
        "someone/two": {"one.safetensors": weights, "two.safetensors": weights},
        "someone/pickle": {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": b"\x80pickle"},
        "gated/adapter": files,
        **steps,
    })  # fmt: skip
    yield found
    found.close()


def test_adapter_is_fetched_with_its_own_files_only(hub: Hub, tmp_path: Path) -> None:
    names = ["someone/adapter", "someone/adapter@v1", "someone/nested@main/final", "hf://someone/nested/final"]
    done = hub.run(tmp_path, "-c", LOAD, *names, "someone/file")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each[1] for each in found] == [[Q, V]] * 5, done.stderr
    assert [each[0] for each in found] == [
        "someone/adapter@0123456", "someone/adapter@0123456", "someone/nested/final@0123456",
        "someone/nested/final@0123456", "someone/file@0123456",
    ]  # fmt: skip
    assert not any(".bin" in path or ".png" in path for path in hub.requested)
    assert "fetching someone/adapter from the hub" in done.stderr


def test_cached_adapter_is_read_without_a_network(hub: Hub, tmp_path: Path) -> None:
    names = ["someone/adapter", "someone/nested@main/final"]
    before = hub.run(tmp_path, "-c", LOAD, *names).stdout
    after = hub.run(tmp_path, "-c", LOAD, *names, "someone/file", HF_HUB_OFFLINE="1").stdout
    *cached, missing = after.splitlines()
    assert cached == before.splitlines()
    assert json.loads(missing) == [
        "ValueError",
        "cannot load someone/file: it is not a local path, and HF_HUB_OFFLINE is set; the cache does not contain it",
    ]


def test_refusal_is_one_line(hub: Hub, tmp_path: Path) -> None:
    expected = {
        "gated/adapter": "it is gated on http://127.0.0.1:",
        "someone/absent": "has no such repository, or it is private",
        "someone/adapter@v9": "has no such revision",
        "someone/two": "2 files of weights; download one and pass its path: one.safetensors, two.safetensors",
        "someone/nested": "its adapters are in folders; pass one: hf://someone/nested/final",
        "someone/pickle": "adapter_model.bin is a pickle, and pickles are never loaded",
    }
    found = [json.loads(line) for line in hub.run(tmp_path, "-c", LOAD, *expected).stdout.splitlines()]
    for (kind, message), (name, words) in zip(found, expected.items(), strict=True):
        assert kind == "ValueError"
        assert message.startswith(f"cannot load {name}: ")
        assert words in message
        assert "\n" not in message


def test_command_line_names_the_commit(hub: Hub, tmp_path: Path) -> None:
    for command in (["inspect"], ["doctor"], ["export", "--rank-pattern"], ["plot", "spectrum"]):
        words = [command[0], *command[1:], "someone/adapter"]
        out = ["-o", "spectrum.svg"] if command[0] == "plot" else []
        done = hub.run(tmp_path, "-m", "lorascope.cli", *words, *out)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        if command[0] == "doctor":
            assert done.stdout.startswith("someone/adapter@0123456")
        if command[0] == "inspect":
            assert f"hub            someone/adapter, commit {COMMIT}\n" in done.stdout
    assert hub.run(tmp_path, "-m", "lorascope.cli", "inspect", "someone/absent").returncode == 2


SERIES = """
import sys
import lorascope as ls
series = ls.load_series(sys.argv[1:])
print(series.label, series.update_steps(), [float(series.updates(step)[name].B[0, 0])
      for step in series.update_steps() for name in series.updates(step)])
"""


def test_revisions_are_the_checkpoints_of_a_series(hub: Hub, tmp_path: Path) -> None:
    names = ["someone/adapter@step-200", "someone/adapter@step-100"]
    done = hub.run(tmp_path, "-c", SERIES, *names)
    assert done.stdout == "someone/adapter [100, 200] [100.0, 200.0]\n", done.stderr
    done = hub.run(tmp_path, "-m", "lorascope.cli", "inspect", *names, "--series", HF_HUB_OFFLINE="1")
    assert "checkpoints    2, steps 100 to 200\n" in done.stdout, done.stderr
    assert f"hub            someone/adapter, commit {hashlib.sha1(b'step-200').hexdigest()}\n" in done.stdout


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("user/adapter", HubName("user/adapter", None, "")),
        ("user/adapter@v1.0", HubName("user/adapter", "v1.0", "")),
        ("user/adapter@main/deep/folder", HubName("user/adapter", "main", "deep/folder")),
        ("hf://user/adapter/deep", HubName("user/adapter", None, "deep")),
        *((name, None) for name in (
            "adapter", "./user/adapter", "/user/adapter", "~/adapter", "user/adapter/deep", "user/adapter.safetensors",
            "runs\\lora", "user/..", "user/a--b", "-user/adapter", "user/adapter@main/../x", "",
        )),
    ],
)  # fmt: skip
def test_name_that_looks_like_a_path_is_not_a_name_on_the_hub(name: str, expected: HubName | None) -> None:
    assert parse_name(name) == expected


def test_local_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    with pytest.raises(FileNotFoundError, match=r"cannot load user/adapter: the path does not exist$"):
        locate("user/adapter")  # its first part is a folder here
    (tmp_path / "user" / "adapter").mkdir()
    assert locate("user/adapter") == Path("user/adapter")


def test_label_of_a_path() -> None:
    inside = Path(f"/cache/models--user--adapter/snapshots/{COMMIT}")
    assert label(inside) == "user/adapter@0123456"
    assert label(inside / "final") == "user/adapter/final@0123456"
    assert label(Path("/runs/lora")) == "lora"
    assert model_name(str(inside)) == "user/adapter"
    for name in ("minilm", "org/base", "/models/base", "unknown"):
        assert model_name(name) == name


NORM = """
import sys
import lorascope as ls
print(float(next(iter(ls.load(sys.argv[1]).updates().values())).norm()))
"""


def adapter_files(folder: Path, alpha: int, value: float) -> dict[str, bytes]:
    write(folder, {Q: (np.full((4, 1), value), np.ones((1, 5)))}, alpha)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("requests", [1, 2, 3, 4])
def test_files_are_of_one_commit_if_another_is_pushed_in_between(tmp_path: Path, requests: int) -> None:
    old, new = adapter_files(tmp_path / "old", 1, 1.0), adapter_files(tmp_path / "new", 32, 10.0)
    hub = Hub({"a/b": new, "a/b@old": old, "a/b@new": new})
    hub.pushed["a/b"] = ["old"] * requests + ["new"]
    done = hub.run(tmp_path, "-c", NORM, "a/b")
    hub.close()
    norm = 20**0.5
    assert float(done.stdout) == pytest.approx(norm) or float(done.stdout) == pytest.approx(320 * norm)


@pytest.mark.slow  # waits for the time limit of the requests
@pytest.mark.parametrize("after", ["", "H"])
@pytest.mark.parametrize("answered", [0, 1, 3])
def test_hub_that_stops_answering_is_one_line(tmp_path: Path, answered: int, after: str) -> None:
    hub = Hub({"a/b": adapter_files(tmp_path / "old", 1, 1.0)})
    hub.silent_after, hub.after = answered, after
    begin = time.monotonic()
    done = hub.run(tmp_path, "-m", "lorascope.cli", "inspect", "a/b")
    assert time.monotonic() - begin < 60
    hub.close()
    *progress, line = done.stderr.splitlines()
    assert done.returncode == 2
    assert progress in ([], ["fetching a/b from the hub"])
    assert line.startswith("lorascope: cannot load a/b: it is not a local path, and http://127.0.0.1:")
    assert line.endswith("cannot be reached; the cache does not contain it")


def test_hub_without_a_network_is_one_line(tmp_path: Path) -> None:
    hub = Hub({})
    hub.close()
    done = hub.run(tmp_path, "-m", "lorascope.cli", "inspect", "a/b")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.endswith("cannot be reached; the cache does not contain it")
