"""Where the runs of a sweep go: processes of this machine, or a dask or ray cluster, by an address, through joblib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from joblib import parallel_config

# What a backend raises when a worker was taken away; by name, since most of them are not installed.
_DEATHS = {"TerminatedWorkerError", "BrokenProcessPool", "KilledWorker", "RayActorError", "WorkerCrashedError"}


def is_death(error: BaseException) -> bool:
    """Does this error say that a worker is gone, rather than that something is wrong with its work?"""
    return bool(_DEATHS & {kind.__name__ for kind in type(error).__mro__})


@contextmanager
def use_backend(
    name: str | None = None, address: str | None = None, jobs: int | None = None, **options: Any
) -> Iterator[None]:
    """Within, joblib works on this backend.

    Parameters
    ----------
    name : str, optional
        Any that joblib knows, and ray; without one, what ``joblib.parallel_config`` says stays.
    address : str, optional
        Of the scheduler of dask, or of the cluster of ray. Without one, dask takes the client that is there already,
        and ray the environment's ``RAY_ADDRESS`` or a new cluster on this machine.
    jobs : int, optional
        How many runs at a time; as many as there are cores by default.
    **options
        To joblib and its backend, as they are.

    Raises
    ------
    ValueError
        The backend is unknown or not installed, does not take these options, or does not answer.
    """
    if jobs is not None and (type(jobs) is not int or jobs == 0):
        raise ValueError(f"jobs = {jobs!r} must be a whole number: how many runs at a time")
    if address is not None and name not in ("dask", "ray"):
        raise ValueError(f"backend {name} takes no address {address!r}: dask and ray do")
    if jobs is not None or name is not None:
        options["n_jobs"] = jobs or -1
    with ExitStack() as stack:
        try:
            if name == "ray":
                stack.enter_context(_ray(address))
            stack.enter_context(parallel_config(**_cluster_config(name, address, options)))
        except ImportError:
            raise ValueError(f"backend {name} is not installed: pip install 'lorascope[cluster]'") from None
        except OSError:
            raise ValueError(f"no {name} cluster answers at {address}") from None
        except TypeError as error:
            raise ValueError(f"backend {name} does not take these options: {error}") from None
        yield


def _cluster_config(name: str | None, address: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """What ``joblib.parallel_config`` takes; a cluster's own options go into its backend."""
    if name not in ("dask", "ray"):
        return options if name is None else {"backend": name, **options}
    own = {key: value for key, value in options.items() if key != "n_jobs"}
    backend = _dask_backend(address, own) if name == "dask" else _ray_backend(own)
    return {"backend": backend, "n_jobs": options["n_jobs"]}


class RaiseClusterErrors:
    """Raises the errors of a cluster itself, such as a killed worker, which joblib takes for results."""

    def retrieve_result_callback(self, out: Any) -> Any:
        if isinstance(out, BaseException):
            raise out
        return super().retrieve_result_callback(out)  # type: ignore[misc]


def _dask_backend(address: str | None, options: dict[str, Any]) -> Any:
    """joblib's backend for dask, with dask's own options."""
    from joblib._dask import DaskDistributedBackend

    class Dask(RaiseClusterErrors, DaskDistributedBackend):
        """Tells joblib of errors of dask itself, too: for these it waits in vain."""

        def submit(self, func: Any, callback: Any = None) -> Any:
            future = super().submit(func, callback)
            future.add_done_callback(lambda done: done.exception() is not None and callback(done.exception()))
            return future

    return Dask(scheduler_host=address, **options)


def _ray_backend(options: dict[str, Any]) -> Any:
    """ray's backend for joblib, with ray's own options."""
    from ray.util.joblib.ray_backend import RayBackend

    class Ray(RaiseClusterErrors, RayBackend):
        """Hands results over as they come, which joblib lets no pool do, but this one does."""

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
