"""Command line: commands, exit codes, one-line errors, and imported modules."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from joblib.parallel import get_active_backend
from test_inspect import llama, plant

import lorascope
from lorascope.cli import doctor
from lorascope.cli.arguments import _flag_type, options_of
from lorascope.cli.main import COMMANDS, main
from lorascope.experiments import sweep
from lorascope.methods import METHODS
from lorascope.plots import FIGURES
from lorascope.runs.loading import load


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a command line."""
    try:
        code = main(list(map(str, words)))
    except SystemExit as stop:  # raised by --help
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def complaint(capsys: pytest.CaptureFixture[str], *words: object, code: int = 2) -> str:
    """Return the one line on stderr of a command line that fails."""
    found, out, err = run(capsys, *words)
    assert found == code
    assert out == ""
    assert err.startswith("lorascope: ")
    assert err.count("\n") == 1
    return err.removeprefix("lorascope: ").rstrip("\n")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return plant(tmp_path / "my-adapter", llama(2, [1.0, 0.5, 0.2, 0.1]))


@pytest.fixture
def reviews(tmp_path: Path, task: Any) -> Path:
    """The tiny task as a CSV file."""
    rows = pd.concat([task.split(name) for name in ("train", "validation", "test")])
    rows[["text", "label"]].to_csv(tmp_path / "reviews.csv", index=False)
    return tmp_path / "reviews.csv"


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"lorascope {lorascope.__version__}\n", "")
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    assert all(f"  {name} " in out for name in COMMANDS)
    assert "lorascope train lora" in out
    assert run(capsys) == (2, out, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, name, "--help")
    assert (code, err) == (0, "")
    assert f"Example: lorascope {name} " in out


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plot", name, "--help")
    assert code == 0
    assert f"Example: lorascope plot {name} " in out
    assert "--control" in out


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_help_with_its_own_fields(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "train", name, "--help")
    assert code == 0
    assert f"Example: lorascope train {name} " in out
    assert "--batch-size" in out
    assert ("--rank " in out) == hasattr(METHODS[name](), "rank")


def test_wrong_arguments_print_one_line_with_a_suggestion(capsys: pytest.CaptureFixture[str], adapter: Path) -> None:
    assert complaint(capsys, "inspcet") == "unknown command 'inspcet'; did you mean 'inspect'?"
    assert complaint(capsys, "zzz") == f"unknown command 'zzz'; expected one of {', '.join(COMMANDS)}"
    assert complaint(capsys, "inspect").startswith("PATH is required: lorascope inspect")
    assert "Unrecognized options: --jsn; did you mean --json?" in complaint(capsys, "inspect", adapter, "--jsn")
    assert "--json and --csv cannot be combined" in complaint(capsys, "inspect", adapter, "--json", "--csv")
    assert "cannot load nowhere" in complaint(capsys, "inspect", "nowhere")
    assert "unknown figure 'spectrm'; did you mean 'spectrum'" in complaint(capsys, "plot", "spectrm", adapter)
    assert complaint(capsys, "plot", "spectrum").startswith("RUN is required: lorascope plot spectrum")
    assert "unknown method 'lora2'; did you mean 'lora'" in complaint(capsys, "train", "lora2")
    assert complaint(capsys, "train", "lora") == "pass steps or epochs, such as steps=300, got neither"
    assert "Error parsing --rank" in complaint(capsys, "train", "lora", "--steps", 3, "--rank", "x")
    assert "nowhere.csv" in complaint(capsys, "train", "lora", "--steps", 3, "--task", "nowhere.csv")


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["inspect", ""], "argument '' must not be empty"),
        (["plot", "spectrum", "x", "-o", ""], "argument '' after -o must not be empty"),
        (["train", "lora", "--steps", "3", "--task="], "argument --task= must not be empty"),
        (["plot", "spectrum", "x", "--control"], "argument --control must not be empty"),
        (["plot", "spectrum", "x", "--control", "-o", "y.pdf"], "argument --control must not be empty"),
    ],
)
def test_empty_argument_is_named(words: list[str], start: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert complaint(capsys, *words).startswith(start)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("no\nsuch  thing"), 2, "no such thing"),
        (FileNotFoundError("cannot load x"), 2, "cannot load x"),
        (PermissionError(errno.EACCES, "Permission denied"), 2, "[Errno 13] Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (FloatingPointError("the loss became nan"), 1, "the loss became nan"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), 2,
         f"cannot open {'x' * 100!r} ...: File name too long"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.\nSee x"), 1,
         "not enough memory: CUDA out of memory. Tried to allocate 2 GiB"),
        (MemoryError(), 1, "not enough memory"),
        (MemoryError("Unable to allocate 2 TiB"), 1, "not enough memory: Unable to allocate 2 TiB"),
        (KeyboardInterrupt("stopped after step 3 of 9; the same call resumes"), 130,
         "stopped after step 3 of 9; the same command resumes"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)  # fmt: skip
def test_exit_codes(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(doctor, "open_runs", fail)
    assert complaint(capsys, "doctor", "x", code=code) == line


def test_unexpected_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "open_runs", lambda *_: {}["x"])
    with pytest.raises(KeyError):
        main(["doctor", "x"])


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("lora", "rank", "99999999999999999999"),
        ("lora", "rank", "1000000000000"),
        ("lora", "max-length", "99999999999999999999"),
        ("lora", "alpha", "1e308"),
        ("lora", "targets", "a{99999999999}"),
        ("lora", "device", "meta"),
        ("alora", "init-rank", "99999999999999999999"),
        ("hydralora", "num-experts", "99999999999999999999"),
        ("hydralora", "num-experts", "9223372036854775807"),
        ("adapprox", "growth-scale", "inf"),
        ("adalora", "gamma", "nan"),
        ("fourierft", "center", "1e308"),
    ],
)
def test_extreme_value_of_train_is_reported_in_one_line(
    method: str, option: str, value: str, bert: str, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", method, "--model", bert, "--task", reviews, "--steps", 2, "-o", tmp_path / "run", "--no-progress"]
    line = complaint(capsys, *words, f"--{option}", value)
    assert option.replace("-", "_") in line
    assert str(float(value) if value == "1e308" else value) in line


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000])
def test_path_that_is_too_long_is_invalid_usage(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "survey", "doctor", "report"):
        line = complaint(capsys, command, name)
        assert "too long" in line
        assert len(line) < 300


def test_warnings_are_printed_in_one_line() -> None:
    code = "import warnings; from lorascope.cli.main import main; main(); warnings.warn('one\\ntwo')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "lorascope: warning: one two"


def test_train_then_inspect_then_plot(
    bert: str, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--model", bert, "--task", reviews, "--steps", 4, "--batch-size", 8, "--no-progress"]
    own = ["--rank", 2, "--targets", "q", "k", "--alpha", 4, "--lr", "1e-2"]
    code, out, err = run(capsys, "train", "lora", *common, *own, "-o", "run")
    assert (code, err) == (0, "")
    trained = load("run")
    assert out.splitlines()[0] == repr(trained).splitlines()[0]
    stored = trained.meta.method
    assert (stored["rank"], stored["alpha"], stored["targets"]) == (2, 4.0, ["q", "k"])
    assert trained.meta.settings["lr"] == 0.01
    assert trained.meta.settings["batch_size"] == 8
    assert len(trained.ranks()) == 4

    # The same command line finds the run again.
    code, out, _ = run(capsys, "train", "lora", *common, *own, "-o", "run", "--json")
    told = json.loads(out)
    assert (code, told["id"], told["status"], told["path"]) == (0, trained.id, "done", "run")
    assert told["test"]["metric"] == trained.score.metric
    assert trained.id in complaint(capsys, "train", "lora", *common, "-o", "run")

    code, out, _ = run(capsys, "inspect", "run")
    assert code == 0
    assert trained.label in out.splitlines()[0]
    code, out, _ = run(capsys, "plot", "norm_over_steps", "run", "-o", "figures/norm.csv")
    assert (code, out) == (0, "figures/norm.csv\n")
    assert Path("figures/norm.csv").exists()


def test_train_with_diverging_loss_exits_1_and_saves_a_broken_run(
    bert: str, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "full", "--model", bert, "--task", reviews, "--steps", 30, "--lr", "1e30", "--no-progress"]
    line = complaint(capsys, *words, "-o", tmp_path / "run", code=1)
    assert "nan" in line
    code, out, _ = run(capsys, "inspect", tmp_path / "run")
    assert code == 1
    assert "broken" in out


def test_plot_lists_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plot")
    assert code == 0
    assert all(name in out for name in FIGURES)
    assert max(map(len, out.splitlines())) <= 80


def test_plot_passes_arguments_to_the_figure(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    module = "model.layers.1.mlp.up_proj"
    code, out, _ = run(capsys, "plot", "spectrum", adapter, "--module", module, "--json")
    assert code == 0
    told = json.loads(out)
    assert told == {"figure": "spectrum", "path": "figures/spectrum.pdf"}
    assert Path("figures/spectrum.pdf").read_bytes().startswith(b"%PDF")
    run(capsys, "plot", "spectrum", adapter, "--module", module, "-o", "s.csv")
    values = pd.read_csv("s.csv")["value"]
    assert values.max() == pytest.approx(4.0)  # 2 (the scale) x 2 (layer 1) x 1.0
    assert "no.such" in complaint(capsys, "plot", "spectrum", adapter, "--module", "no.such")
    assert "extension must be one of" in complaint(capsys, "plot", "spectrum", adapter, "-o", "s.doc")
    for name in ("s.csv", "figures/spectrum.pdf"):  # its own figures are replaced
        assert run(capsys, "plot", "spectrum", adapter, "-o", name)[0] == 0
    for name in ("mine.csv", "mine.pdf"):
        Path(name).write_text("kept", encoding="utf-8")
        foreign = f"cannot write {name}: it exists and was not written by lorascope"
        assert foreign in complaint(capsys, "plot", "spectrum", adapter, "-o", name)
        assert Path(name).read_text(encoding="utf-8") == "kept"


def test_plot_accepts_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [plant(tmp_path / name, llama(2, [size, 0.5])) for size, name in enumerate(("a", "b", "x=y"), start=1)]
    file = tmp_path / "s.csv"
    labelled = [f"small={folders[0]}", folders[1], folders[2]]
    assert run(capsys, "plot", "spectrum", *labelled, "-o", file)[0] == 0
    assert set(pd.read_csv(file)["recipe"]) == {"small", "b", "x=y"}


def test_closed_pipe_exits_0(adapter: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "lorascope.cli", "inspect", str(adapter), "--json"],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.stderr, done.returncode) == (b"", 0)


def modules_after(code: str, *words: str) -> set[str]:
    """Return the modules that a fresh interpreter has imported after running code."""
    report = "import json, sys; print('\\n' + json.dumps(sorted(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}", *words], capture_output=True, text=True, check=True, env=environment
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_methods_import_no_models_no_peft_and_no_scikit_learn() -> None:
    assert not modules_after("import lorascope.methods") & {"transformers.modeling_utils", "peft", "sklearn"}


@pytest.mark.parametrize("code", ["import lorascope", "from lorascope.cli.main import main; main(['--help'])"])
def test_package_and_help_import_no_heavy_modules(code: str) -> None:
    assert not modules_after(code) & {"torch", "transformers", "pandas", "numpy", "matplotlib", "tyro"}


@pytest.mark.parametrize("words", [["inspect"], ["inspect", "--all"], ["inspect", "--json"], ["doctor"]])
def test_inspect_and_doctor_import_only_what_they_use(adapter: Path, words: list[str]) -> None:
    call = "import sys; from lorascope.cli.main import main; main(sys.argv[1:])"
    heavy = {"torch", "transformers", "peft", "matplotlib", "plotly", "scipy", "pyarrow", "pandas.core", "regex"}
    heavy |= {"jaxtyping", "typeguard", "asyncio", "importlib.metadata", "html.entities"}
    assert not modules_after(call, *words, str(adapter)) & heavy
    # pandas is there for a table.
    assert "pandas.core" in modules_after(call, "inspect", "--csv", str(adapter))


@pytest.mark.parametrize(("call", "frozen"), [("main()", True), ("main(sys.argv[1:])", False)])
def test_garbage_collector_skips_modules_in_a_process_of_the_command_only(
    adapter: Path, call: str, frozen: bool
) -> None:
    code = (
        f"import gc, sys; from lorascope.cli.main import main; {call}; print(gc.isenabled(), gc.get_freeze_count() > 0)"
    )
    words = [sys.executable, "-c", code, "inspect", str(adapter)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"True {frozen}"


def test_plot_does_not_import_torch(adapter: Path, tmp_path: Path) -> None:
    call = "import sys; from lorascope.cli.main import main; main(['plot', 'spectrum', sys.argv[1], '-o', sys.argv[2]])"
    assert not modules_after(call, str(adapter), str(tmp_path / "x.pdf")) & {"torch", "transformers", "peft"}


@pytest.mark.parametrize(
    ("hint", "flag"),
    [
        (int, int),
        (float | None, float | None),
        (str | Path | None, str | None),
        (str | tuple[str, ...], str | tuple[str, ...]),
        (dict[str, int] | int, int),
        (dict[str, int], None),
        (Any, None),
        (type(None), None),
    ],
)
def test_flag_type_returns_the_part_a_command_line_can_express(hint: Any, flag: Any) -> None:
    assert _flag_type(hint) == flag


def test_options_take_help_from_the_docstring() -> None:
    def draw(runs: list[int], depth: float = 3, *, names: dict[str, int] | None = None, fast: bool = True) -> None:
        """Draw.

        Parameters
        ----------
        runs : list
            What is drawn.
        depth, other : int
            How deep,
            in ``metres``.
        fast : bool
            Be fast.
        """

    depth, fast = options_of(draw, skip=("runs",))
    assert (depth.name, fast.name) == ("depth", "fast")
    assert depth.default == 3.0
    assert isinstance(depth.default, float)
    assert depth.annotation.__metadata__[0].help == "How deep, in metres"
    assert fast.annotation.__metadata__[0].help == "do not be fast"


def test_train_options_of_a_method_exclude_learning_rates(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "train", "lora", "--help")
    assert out.count(" --rank ") == out.count(" --lr ") == out.count(" --head-lr ") == 1


SWEEP = """
model = "{model}"
task = "{task}"
method = [{{name = "lora", rank = [2, 4]}}, {{name = "lora", targets = "nowhere"}}]
seeds = 2
root = "{root}"
settings = {{steps = 2, batch_size = 4, eval_every = 0}}
backend = {{name = "sequential"}}
"""


def test_sweep_prints_a_table_and_a_line_per_failed_run(
    bert: str, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, root = tmp_path / "ranks.toml", tmp_path / "runs"
    file.write_text(SWEEP.format(model=bert, task=reviews, root=root))
    code, out, err = run(capsys, "sweep", file, "--no-progress")
    assert code == 1
    assert [line.split("  ")[0] for line in out.splitlines()[1:3]] == ["LoRA, rank 2", "LoRA, rank 4"]
    assert all(line.rstrip().endswith("2  1-2") for line in out.splitlines()[1:3])
    told = " ".join(out.split())
    assert "(fewer than 3 seeds): LoRA, rank 2 and LoRA, rank 4" in told
    assert max(map(len, out.splitlines())) <= 80
    failed = err.splitlines()
    assert len(failed) == 2
    assert "failed: LoRA, targets nowhere, seed 1: ValueError" in failed[1]

    stamps = {path: path.stat().st_mtime_ns for path in root.glob("*/run.json")}
    assert len(stamps) == 4
    code, out, err = run(capsys, "sweep", file, "--json")
    told = json.loads(out)
    assert (code, len(told["runs"]), len(told["failed"]), len(told["recipes"])) == (1, 4, 2, 2)
    assert {row["path"] for row in told["runs"]} == {str(path.parent) for path in stamps}
    assert told["recipes"][0]["value"] == pytest.approx(sum(row["value"] for row in told["runs"][:2]) / 2)
    assert stamps == {path: path.stat().st_mtime_ns for path in root.glob("*/run.json")}
    assert "[4/6] done    LoRA, rank 4, seed 1" in err


def test_sweep_options_override_the_backend_of_the_file(
    bert: str, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, seen = tmp_path / "ranks.toml", []

    def no_runs(wanted: Sequence[sweep.Job], *rest: Any) -> sweep.SweepResult:
        backend, jobs = get_active_backend()
        seen.append((type(backend).__name__, jobs))
        return sweep.SweepResult(wanted)

    monkeypatch.setattr(sweep, "run_jobs", no_runs)
    text = SWEEP.format(model=bert, task=reviews, root=tmp_path / "runs")
    file.write_text(text.replace('name = "sequential"', 'name = "threading", jobs = 2'))
    for words in ((), ("--jobs", "3"), ("--backend", "threading", "--jobs", "4"), ("--backend", "loky", "--jobs", "5")):
        assert run(capsys, "sweep", file, "--no-progress", *words)[:2] == (0, "no finished runs\n")
    assert seen == [("ThreadingBackend", 2), ("ThreadingBackend", 3), ("ThreadingBackend", 4), ("LokyBackend", 5)]


@pytest.mark.slow
def test_sweep_counts_runs_that_learn_the_same_once(
    bert: str, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They differ in observers, checkpoint interval, and a learning rate that the settings override."""
    file = tmp_path / "same.toml"
    twice = 'lr = 1e-3, observe = [["norms"], ["norms", "factors"]], checkpoint_every = [1, 5]'
    text = SWEEP.format(model=bert, task=reviews, root=tmp_path / "runs").replace(
        "eval_every = 0", f"eval_every = 0, {twice}"
    )
    methods = '[{name = "lora", rank = 2, lr = [1e-3, 1e-4]}, {name = "lora", rank = 4}]'
    file.write_text(
        "\n".join(f"method = {methods}" if line.startswith("method") else line for line in text.splitlines())
    )
    code, out, _ = run(capsys, "sweep", file, "--no-progress")
    assert code == 0
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == ["LoRA, rank 2", "LoRA, rank 4", ""]
    assert all(line.rstrip().endswith("2  1-2") for line in lines[1:3])
    code, out, _ = run(capsys, "sweep", file, "--no-progress", "--json")
    told = json.loads(out)
    assert (code, len(told["runs"]), len({row["path"] for row in told["runs"]})) == (0, 24, 12)
    assert [(row["recipe"], row["n"]) for row in told["recipes"]] == [("LoRA, rank 2", 2), ("LoRA, rank 4", 2)]
    assert len(told["pairs"]) == 1
    values: dict[tuple[str, int], set[float]] = {}
    for row in told["runs"]:
        values.setdefault((row["recipe"], row["seed"]), set()).add(row["value"])
    assert [len(each) for each in values.values()] == [1] * 4  # so any of them represents the others
    mean = sum(values["LoRA, rank 2", seed].copy().pop() for seed in (0, 1)) / 2
    assert told["recipes"][0]["value"] == pytest.approx(mean)


def test_sweep_with_invalid_settings_trains_nothing(
    bert: str, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, root = tmp_path / "ranks.toml", tmp_path / "runs"
    right = SWEEP.format(model=bert, task=reviews, root=root)
    file.write_text(right.replace("rank = [2, 4]", "rank = [2, 0.5]"))
    assert "ranks.toml: method lora: rank must be an integer" in complaint(capsys, "sweep", file)
    file.write_text(right)
    assert "FILE is required" in complaint(capsys, "sweep")
    assert "Invalid backend: slrm" in complaint(capsys, "sweep", file, "--backend", "slrm")
    assert "address must be None for backend loky, got 'x'" in complaint(
        capsys, "sweep", file, "--backend", "loky", "--address", "x"
    )
    pytest.importorskip("distributed")  # first: what it sets at its import would be undone with the setting below
    with pytest.importorskip("dask").config.set({"distributed.comm.timeouts.connect": "100ms"}):
        words = ["--backend", "dask", "--address", "tcp://127.0.0.1:9"]
        assert "dask cluster at tcp://127.0.0.1:9" in complaint(capsys, "sweep", file, *words)
    assert not root.exists()
