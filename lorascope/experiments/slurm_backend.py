"""Backend of joblib for Slurm: one job per run by submitit, with a maximum of jobs and requeue at a time limit."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import submitit
from joblib.parallel import ParallelBackendBase
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError
from submitit.helpers import DelayedSubmission

from lorascope.files.printable import first_line

ATTEMPTS = 3
"""Times that a job is submitted if Slurm ends it without a result, such as for lack of memory."""
_CLUSTERS = ("slurm", "local")
_MINUTES, _TIMEOUTS = 24 * 60, 1000
_PAUSE = 1.0
# joblib computes in this process for one job.
_AT_LEAST = 2
_NO_CAP = 10_000


class ResumedCall:
    """Call that Slurm repeats after preemption or at its time limit, because a run resumes from its checkpoint."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    def __call__(self) -> Any:
        """Return the result of the call."""
        return self.call()

    def checkpoint(self) -> DelayedSubmission:
        """Return the submission that replaces this one, when submitit requeues its job."""
        return DelayedSubmission(self)


@dataclass
class _Submission:
    """Call with the job that computes it; ``callback`` receives its result or error."""

    call: ResumedCall
    callback: Callable[[Any], None]
    job: Any = None
    attempts: int = 0


class SlurmBackend(ParallelBackendBase):
    """Backend that submits each call as a job, and receives the results in order of completion.

    Parameters
    ----------
    options : mapping
        ``folder`` of the logs, default "slurm"; ``cluster``, default "slurm", or "local" for processes of this machine;
        and parameters of ``submitit.AutoExecutor``, such as ``gpus_per_node``, ``mem_gb`` or ``slurm_partition``. The
        default of ``timeout_min`` is a day, after which a run resumes in the next job.

    Raises
    ------
    OSError
        This is not a machine of a Slurm cluster.
    TypeError
        There is no such option, or no such cluster.
    """

    supports_retrieve_callback = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        parameters = {"timeout_min": _MINUTES, **options}
        self.folder = str(parameters.pop("folder", "slurm"))
        cluster = parameters.pop("cluster", "slurm")
        if cluster not in _CLUSTERS:
            raise TypeError(f"cluster must be one of {', '.join(map(repr, _CLUSTERS))}, got {cluster!r}")
        try:
            self._executor = submitit.AutoExecutor(self.folder, cluster, slurm_max_num_timeout=_TIMEOUTS)
        except RuntimeError as error:
            raise OSError(first_line(error)) from None
        try:
            self._executor.update_parameters(**parameters)
        except (AssertionError, NameError, ValueError) as error:
            raise TypeError(first_line(error)) from None
        self._cap = _NO_CAP
        self._lock = threading.Lock()
        self._waiting: deque[_Submission] = deque()
        self._running: list[_Submission] = []
        self._watcher: threading.Thread | None = None

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Set the maximum number of jobs at a time; a negative number removes it."""
        self._cap = n_jobs if n_jobs is not None and n_jobs > 0 else _NO_CAP
        return max(self._cap, _AT_LEAST)

    def submit(self, func: Callable[[], Any], callback: Callable[[Any], None]) -> _Submission:
        """Queue a call, whose result or error is passed to the callback."""
        submission = _Submission(ResumedCall(func), callback)
        with self._lock:
            self._waiting.append(submission)
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, daemon=True)
                self._watcher.start()
        return submission

    def retrieve_result_callback(self, out: Any) -> Any:
        """Return a result, or raise an error of Slurm."""
        if isinstance(out, BaseException):
            raise out
        return out

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Cancel all jobs."""
        with self._lock:
            self._waiting.clear()
            cancelled, self._running = self._running, []
        for submission in cancelled:
            submission.job.cancel(check=False)

    def terminate(self) -> None:
        """Cancel the jobs that are left, none unless the sweep was interrupted."""
        self.abort_everything()

    def _watch(self) -> None:
        """Submit the queued calls, and pass on results, until none is left."""
        while True:
            finished = []
            with self._lock:
                while self._waiting and len(self._running) < self._cap:
                    submission = self._waiting.popleft()
                    try:
                        submission.job = self._executor.submit(submission.call)
                    except FailedSubmissionError as error:
                        finished.append((submission, ValueError(f"cannot submit a job to Slurm: {first_line(error)}")))
                        continue
                    submission.attempts += 1
                    self._running.append(submission)
                for submission in list(self._running):
                    if submission.job.done():
                        self._running.remove(submission)
                        out = self._result(submission)
                        if isinstance(out, UncompletedJobError) and submission.attempts < ATTEMPTS:
                            self._waiting.append(submission)
                        else:
                            finished.append((submission, out))
                if not (self._waiting or self._running):
                    self._watcher = None
                is_last = self._watcher is None
            # Without the lock, because joblib may call this backend in a callback.
            for submission, out in finished:
                submission.callback(out)
            if is_last:
                return
            time.sleep(_PAUSE)

    def _result(self, submission: _Submission) -> Any:
        """Return the result of a finished job, or its error."""
        try:
            return submission.job.result()
        except FailedJobError as error:
            # A run reports its own errors, so this one is of the environment, such as a missing package.
            reason = str(error).strip().splitlines()[-1]
            return ValueError(f"job {submission.job.job_id} of Slurm failed: {reason} (logs in {self.folder})")
        except UncompletedJobError as error:
            return error
