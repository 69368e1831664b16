"""Backends of joblib for a sweep: processes of this machine, or a dask or ray cluster with an address."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from joblib import parallel_config

# Errors that a backend raises when it loses a worker; matched by name, since most backends are not installed.
_DEATHS = {"TerminatedWorkerError", "BrokenProcessPool", "KilledWorker", "RayActorError", "WorkerCrashedError"}


def is_death(error: BaseException) -> bool:
    """Return whether an error means that a worker is gone, and not that its job failed."""
    return bool(_DEATHS & {kind.__name__ for kind in type(error).__mro__})


@contextmanager
def use_backend(
    name: str | None = None, address: str | None = None, jobs: int | None = None, **options: Any
) -> Iterator[None]:
    """Run joblib on a backend inside the context.

    Parameters
    ----------
    name : str, optional
        Any backend of joblib, or "ray"; None keeps the setting of ``joblib.parallel_config``.
    address : str, optional
        Address of the dask scheduler or the ray cluster. By default dask uses the existing client, and ray uses the
        environment's ``RAY_ADDRESS`` or starts a cluster on this machine.
    jobs : int, optional
        Number of parallel runs, default the number of cores.
    **options
        Passed to joblib and its backend.

    Raises
    ------
    ValueError
        The backend is unknown, not installed or unreachable, or does not accept these options.
    """
    if jobs is not None and (type(jobs) is not int or jobs == 0):
        raise ValueError(f"jobs must be a nonzero integer (number of parallel runs), got {jobs!r}")
    if address is not None and name not in ("dask", "ray"):
        raise ValueError(f"address must be None for backend {name}, got {address!r}: only dask and ray have one")
    if jobs is not None or name is not None:
        # -1 means all cores.
        options["n_jobs"] = jobs or -1
    with ExitStack() as stack:
        try:
            if name == "ray":
                stack.enter_context(_ray(address))
            stack.enter_context(parallel_config(**_cluster_config(name, address, options)))
        except ImportError:
            raise ValueError(
                f"cannot use backend {name}: it is not installed. Run pip install 'lorascope[cluster]'"
            ) from None
        except OSError:
            raise ValueError(f"cannot connect to a {name} cluster at {address}") from None
        except TypeError as error:
            raise ValueError(f"cannot pass these options to backend {name}: {error}") from None
        yield


def _cluster_config(name: str | None, address: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``joblib.parallel_config``; options of a cluster belong to its backend."""
    if name not in ("dask", "ray"):
        return options if name is None else {"backend": name, **options}
    own = {key: value for key, value in options.items() if key != "n_jobs"}
    backend = _dask_backend(address, own) if name == "dask" else _ray_backend(own)
    return {"backend": backend, "n_jobs": options["n_jobs"]}


class RaiseClusterErrors:
    """Mixin that raises errors of the cluster, such as a killed worker; joblib treats them as results."""

    def retrieve_result_callback(self, out: Any) -> Any:
        if isinstance(out, BaseException):
            raise out
        return super().retrieve_result_callback(out)  # type: ignore[misc]


def _dask_backend(address: str | None, options: dict[str, Any]) -> Any:
    """Return joblib's backend for dask, with dask's own options."""
    from joblib._dask import DaskDistributedBackend

    class Dask(RaiseClusterErrors, DaskDistributedBackend):
        """dask backend that also reports dask's own errors, for which joblib would wait forever."""

        def submit(self, func: Any, callback: Any = None) -> Any:
            future = super().submit(func, callback)
            future.add_done_callback(lambda done: done.exception() is not None and callback(done.exception()))
            return future

    return Dask(scheduler_host=address, **options)


def _ray_backend(options: dict[str, Any]) -> Any:
    """Return ray's backend for joblib, with ray's own options."""
    from ray.util.joblib.ray_backend import RayBackend

    class Ray(RaiseClusterErrors, RayBackend):
        """ray backend that returns results in order of completion; joblib does not support it for pools by default."""

        supports_return_generator = True

    return Ray(**options)


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    import ray

    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address)
    try:
        yield
    finally:
        if ours:
            ray.shutdown()
