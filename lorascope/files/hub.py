"""Adapters on the Hugging Face Hub by name: only their own files are fetched, into the cache of ``huggingface_hub``.

A name is ``user/adapter``, with ``@revision`` for a branch, tag or commit, and ``/folder`` after that for a subfolder.
After ``hf://``, as in ``hf://user/adapter/folder``, the revision may be left out. A local path of the same name comes
first, and a name that looks like a path is never fetched.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorascope.files.printable import printable, utf8_text
from lorascope.files.whole_files import write_bytes

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors", "pytorch_lora_weights.safetensors")
"""Names of weight files: of PEFT, MLX and diffusers."""
_SEGMENT = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_NAME = re.compile(
    rf"(?P<scheme>hf://)?(?P<repository>{_SEGMENT}/{_SEGMENT})(?:@(?P<revision>[\w.-]+))?(?:/(?P<folder>[\w./-]+))?"
)
_FILE = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|json|zip)$")
_CACHED = re.compile(r"models--(?P<repository>.+)/snapshots/(?P<commit>[0-9a-f]{40})(?:/(?P<folder>.+))?$")


@dataclass(frozen=True)
class HubName:
    """Repository on the Hugging Face Hub, its revision, and a folder in it."""

    repository: str
    revision: str | None
    folder: str

    def __str__(self) -> str:
        revision = f"@{self.revision}" * bool(self.revision)
        return self.repository + revision + f"/{self.folder}" * bool(self.folder)


def parse_name(name: str) -> HubName | None:
    """Return the parts of a name on the hub, or None for a name that looks like a path."""
    match = _NAME.fullmatch(name)
    # The hub rejects names of repositories with two hyphens or points in a row, or more than 96 characters.
    if match is None or "--" in match["repository"] or ".." in name or len(match["repository"]) > 96:
        return None
    folder = (match["folder"] or "").strip("/")
    looks_like_path = _FILE.search(name) or Path(name.split("/")[0]).is_dir() or (folder and not match["revision"])
    if looks_like_path and not match["scheme"]:
        return None
    return HubName(match["repository"], match["revision"], folder)


def locate(name: str | Path) -> Path:
    """Return the local path of a folder or file, fetched from the hub if it is a name there and no local path.

    Raises
    ------
    FileNotFoundError
        No local path has this name, and it is not a name on the hub.
    ValueError
        The hub does not give the adapter.
    """
    path = Path(os.path.expanduser(name))
    if path.exists():
        return path
    hub_name = parse_name(str(name))
    if hub_name is None:
        raise FileNotFoundError(f"cannot load {printable(path)}: the path does not exist")
    return _fetch(hub_name, _adapter_files)


def locate_base(name: str | Path) -> Path:
    """Return the local folder of a base model: a path, or a model in the cache of the Hugging Face Hub.

    Raises
    ------
    ValueError
        The cache does not contain the model.
    """
    path = Path(os.path.expanduser(name))
    if not path.exists() and (hub_name := parse_name(str(name))):
        return _fetch(hub_name, _cached_model)
    return path


def hub_source(path: Path) -> tuple[str, str] | None:
    """Return repository (with the subfolder) and commit of a path in the hub's cache; None for other paths."""
    match = _CACHED.search(path.absolute().as_posix())
    if match is None:
        return None
    return "/".join(filter(None, (match["repository"].replace("--", "/"), match["folder"]))), match["commit"]


def model_name(name: str) -> str:
    """Return the hub name of a model for its folder in the hub's cache; other names and folders are unchanged."""
    # A relative path in the cache is a name there as well.
    if not os.path.isabs(name) or (source := hub_source(Path(name))) is None:
        return name
    return source[0]


def commit_of(path: Path) -> str | None:
    """Return the commit of a path in the hub's cache; None for other paths."""
    source = hub_source(path)
    return None if source is None else source[1]


def label(path: Path) -> str:
    """Return the name of a file or folder; in the cache of the Hugging Face Hub, repository and commit."""
    if (source := hub_source(path)) is not None:
        return f"{source[0]}@{source[1][:7]}"
    return utf8_text(path.name if path.is_file() else path.resolve().name)


def _fetch(name: HubName, files: Callable[[HubName], Path]) -> Path:
    """Return what ``files`` returns, with one line for each way in which the hub refuses."""
    from huggingface_hub import constants, errors  # slow import

    from lorascope.files.hub_answers import without_retries

    cannot, where = f"cannot load {name}: it is not a local path, and", constants.ENDPOINT
    try:
        with without_retries():
            return files(name)
    except errors.GatedRepoError:
        reason = f"it is gated on {where}; accept its terms there, then `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = f"{where} has no such repository, or it is private; `hf auth login` opens private ones"
    except errors.RevisionNotFoundError:
        reason = f"{where} has no such revision; expected a branch, a tag or a commit"
    except errors.HfHubHTTPError as error:
        reason = f"{where} answered {error.response.status_code}"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HTTPError, TimeoutError):
        mode = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{where} cannot be reached"
        reason = f"{mode}; the cache does not contain it"
    raise ValueError(f"{cannot} {reason}")


def current_commit(repository: str, revision: str | None = None) -> str | None:
    """Return the commit of a revision on the hub; None if the hub does not answer.

    Files are requested at this commit, because a request by name could get those of a later push.
    """
    from huggingface_hub import errors, model_info

    from lorascope.files.hub_answers import ANSWER_SECONDS

    try:
        return model_info(repository, revision=revision, timeout=ANSWER_SECONDS).sha
    except errors.HfHubHTTPError:
        raise
    except (errors.OfflineModeIsEnabled, errors.HTTPError, TimeoutError):
        return None


def note_commit(file: Path, revision: str | None) -> None:
    """Write into the hub's cache that a revision has the commit of a cached file, for loading without a network."""
    match = _CACHED.search(path := file.parent.as_posix())
    if match is None or revision == match["commit"]:
        return
    repository = Path(path[: match.end("commit")]).parents[1]
    reference = repository / "refs" / (revision or "main")
    if reference.exists() and reference.read_text(encoding="utf-8") == match["commit"]:
        return  # the cache may be read-only
    write_bytes(reference, match["commit"].encode())


def _adapter_files(name: HubName) -> Path:
    """Fetch configuration and weights of an adapter, all of the same commit, and return their folder."""
    from huggingface_hub import try_to_load_from_cache

    commit = current_commit(name.repository, name.revision)
    if commit is None:
        return _files_of_revision(name, name.revision, local_files_only=True)
    config = f"{name.folder}/{CONFIG}".lstrip("/")
    if try_to_load_from_cache(name.repository, config, revision=name.revision) is None:
        print(f"fetching {name} from the hub", file=sys.stderr)
    folder = _files_of_revision(name, commit)
    note_commit(folder / CONFIG, name.revision)
    return folder


def _files_of_revision(name: HubName, revision: str | None, local_files_only: bool = False) -> Path:
    """Fetch configuration and weights of an adapter at a revision, and return their folder."""
    from huggingface_hub import errors, hf_hub_download, list_repo_files

    def download(file: str) -> Path:
        options: dict[str, Any] = {"subfolder": name.folder or None, "local_files_only": local_files_only}
        return Path(hf_hub_download(name.repository, file, revision=revision, **options))

    folder = None
    for file in (CONFIG, *WEIGHTS):
        try:
            folder = download(file).parent
        except errors.EntryNotFoundError as error:
            # Offline, and the cache has no file of the adapter: no other name can help.
            if isinstance(error, errors.LocalEntryNotFoundError) and folder is None:
                raise
            continue
        if file != CONFIG:
            return folder
    if folder is not None and any(folder.glob("*.safetensors")):
        return folder  # cached before, and the hub cannot be reached now
    inside = f"{name.folder}/" * bool(name.folder)
    paths = [path for path in list_repo_files(name.repository, revision=revision) if path.startswith(inside)]
    files = [path.removeprefix(inside) for path in paths]
    weights = [file for file in files if "/" not in file and re.search(r"\.safetensors(\.index\.json)?$", file)]
    shards = [file for file in weights if file.startswith("adapter_model")]
    if not shards and len(weights) != 1:
        raise ValueError(f"cannot load {name}: {_contents(name, files, weights)}")
    return [download(file).parent for file in shards or weights][-1]


def _contents(name: HubName, files: list[str], weights: list[str]) -> str:
    """Return what a repository contains instead of one adapter."""
    if weights:
        return f"it contains {len(weights)} files of weights; download one and pass its path: {', '.join(weights)}"
    for file in files:
        if file.endswith((".bin", ".pt", ".ckpt")):
            return f"{file} is a pickle, and pickles are never loaded"
    if folders := {f"hf://{name}/{file.split('/')[0]}" for file in files if file.endswith(".safetensors")}:
        return f"its adapters are in folders; pass one: {', '.join(sorted(folders))}"
    return "it contains no safetensors file"


def _cached_model(name: HubName) -> Path:
    """Return the folder of a model in the cache; nothing is fetched, because models are large."""
    from huggingface_hub import errors, snapshot_download

    options: dict[str, Any] = {"local_files_only": True, "allow_patterns": ["*.safetensors", "*.json"]}
    try:
        return Path(snapshot_download(name.repository, revision=name.revision, **options)) / name.folder
    except errors.LocalEntryNotFoundError:
        raise ValueError(
            f"cannot read base {name}: it is not a local path and not in the cache; "
            f"`hf download {name.repository} --include '*.safetensors' '*.json'`"
        ) from None
