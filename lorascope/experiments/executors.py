"""Backends of joblib for a sweep: processes of this machine, jobs of Slurm, or a cluster of dask or ray."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from multiprocessing import resource_tracker
from typing import Any

from joblib import parallel_config

from lorascope.files.printable import first_line

# Errors that a backend raises when it loses a worker; matched by name, since most backends are not installed.
_DEATHS = {"TerminatedWorkerError", "BrokenProcessPool", "KilledWorker", "RayActorError", "WorkerCrashedError"}
_DEATHS |= {"UncompletedJobError"}
# Backends whose cluster may be elsewhere.
_WITH_ADDRESS = ("dask", "ray")

_HAS_MASKS = hasattr(signal, "pthread_sigmask")  # not on Windows
_MOST_JOBS = 10_000  # far above any cluster; executors reject larger numbers with other errors


def is_death(error: BaseException) -> bool:
    """Return whether an error means that an executor lost a worker, and not that its job failed."""
    return bool(_DEATHS & {kind.__name__ for kind in type(error).__mro__})


@contextmanager
def use_backend(
    name: str | None = None, address: str | None = None, jobs: int | None = None, **options: Any
) -> Iterator[None]:
    """Use a backend of joblib as executor in the context, with ``jobs`` parallel runs, by default one per core.

    ``name`` is any backend of joblib, "ray" or "slurm"; None keeps the setting of ``joblib.parallel_config``.
    ``address`` is the address of the dask scheduler or the ray cluster: by default dask uses the existing client, and
    ray the environment's ``RAY_ADDRESS`` or a new cluster on this machine. Raise a ValueError if the backend is
    unknown, not installed or unreachable, or does not accept the options.
    """
    if jobs is not None and (type(jobs) is not int or not 0 < abs(jobs) <= _MOST_JOBS):
        allowed = f"a nonzero integer (number of parallel runs), at most {_MOST_JOBS}"
        raise ValueError(f"jobs must be {allowed}, got {jobs!r}")
    if address is not None and name not in _WITH_ADDRESS:
        only = " and ".join(_WITH_ADDRESS)
        raise ValueError(f"address must be None for backend {name}, got {address!r}: only {only} have one")
    with ExitStack() as stack:
        try:
            if cluster := _CLUSTERS.get(name or ""):
                options = {"backend": stack.enter_context(cluster(address, options))}
            elif name is not None:
                options["backend"] = name
            if jobs is not None or name is not None:
                options["n_jobs"] = jobs or -1  # -1 means all cores
            stack.enter_context(parallel_config(**options))
        except ImportError:
            raise ValueError(
                f"cannot use backend {name}: it is not installed. Run pip install 'lorascope[cluster]'"
            ) from None
        except OSError as error:
            if name not in _WITH_ADDRESS:
                raise ValueError(f"cannot use backend {name}: {first_line(error)}") from None
            raise ValueError(f"cannot connect to a {name} cluster at {address}") from None
        except TypeError as error:
            raise ValueError(f"cannot pass these options to backend {name}: {error}") from None
        yield


@contextmanager
def ignore_replaced_workers() -> Iterator[None]:
    """Ignore joblib's warning that a worker of an executor stopped inside the context.

    joblib replaces a worker whose memory has grown by 300 MB, between two jobs. No job is lost.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A worker stopped while some jobs were given to the executor")
        yield


@contextmanager
def start_workers_quietly() -> Iterator[None]:
    """Start worker processes that print nothing if Ctrl-C stops the executor or kills this process.

    A worker inherits that SIGINT is blocked, or Ctrl-C in a terminal would end each of them with a traceback amid its
    imports. ``accept_interrupts`` is for the time of a job. The tracker of loky would list its cleanup.
    """
    filters = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [filters, "ignore:resource_tracker"]))
    try:
        if _HAS_MASKS:
            resource_tracker.ensure_running()  # loky needs it, and its start unblocks SIGINT
        with _interrupts("SIG_BLOCK"):
            yield
    finally:
        if filters is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = filters


def accept_interrupts() -> AbstractContextManager[None]:
    """Accept Ctrl-C in a worker for the time of a job, which saves its state before it ends."""
    return _interrupts("SIG_UNBLOCK")


@contextmanager
def _interrupts(action: str) -> Iterator[None]:
    """Block or unblock SIGINT in this thread and the processes that it starts."""
    if not _HAS_MASKS:
        yield
        return
    mask = signal.pthread_sigmask(getattr(signal, action), {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class RaiseClusterErrors:
    """Mixin of executors that raises the cluster's errors, such as a killed worker; joblib treats them as results."""

    def retrieve_result_callback(self, out: Any) -> Any:
        if isinstance(out, BaseException):
            raise out
        return super().retrieve_result_callback(out)  # type: ignore[misc]


@contextmanager
def _dask(address: str | None, options: dict[str, Any]) -> Iterator[Any]:
    from joblib._dask import DaskDistributedBackend

    class Dask(RaiseClusterErrors, DaskDistributedBackend):
        """dask backend that also reports dask's own errors, for which joblib would wait forever."""

        def submit(self, func: Any, callback: Any = None) -> Any:
            future = super().submit(func, callback)
            future.add_done_callback(lambda done: done.exception() is not None and callback(done.exception()))
            return future

    backend = Dask(scheduler_host=address, **options)
    try:
        yield backend
    finally:
        if address is not None:  # the backend has opened a client, which would try to reconnect forever
            backend.client.close()


@contextmanager
def _ray(address: str | None, options: dict[str, Any]) -> Iterator[Any]:
    import ray
    from ray.util.joblib.ray_backend import RayBackend

    class Ray(RaiseClusterErrors, RayBackend):
        """ray backend that returns results in order of completion; joblib does not support it for pools by default."""

        supports_return_generator = True

    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address)
    try:
        yield Ray(**options)
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _slurm(address: None, options: dict[str, Any]) -> Iterator[Any]:
    # Only this backend requires submitit.
    from lorascope.experiments.slurm_backend import SlurmBackend

    yield SlurmBackend(options)


# Context managers of the cluster backends: they receive an address and options, and yield a backend of joblib.
_CLUSTERS: dict[str, Any] = {"dask": _dask, "ray": _ray, "slurm": _slurm}
