"""Many jobs at once: in this process, in processes of this machine, or on a cluster that Ray manages."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from structops.errors import StructureError

Job = TypeVar("Job")
Result = TypeVar("Result")

EXECUTORS = ("local", "ray")


class WorkerError(RuntimeError):
    """A worker process was ended from outside, by a signal or for want of memory."""


def run_all(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    console: Console,
    describe: Callable[[Job], str],
    workers: int | None = None,
    executor: str = "local",
    done: int = 0,
    imports: Sequence[str] = (),
) -> Iterator[tuple[Job, Result]]:
    """Jobs and their results as they end, in any order, and a bar on the console.

    Args:
        function: Of a module, so that another process finds it.
        jobs: Its arguments.
        console: Where the bar goes.
        describe: What the bar says of a job that has ended.
        workers: Processes; one a core if not given, none with 0: then the jobs run here, in their order.
        executor: ``local`` or ``ray``; the latter takes the cluster in ``RAY_ADDRESS``, or starts one on this machine.
        done: Jobs that the bar counts as ended before.
        imports: Modules that every process imports before its job, such as one that registers a structure.

    Raises:
        StructureError: There is no such executor.
        WorkerError: A worker was ended from outside.
    """
    if executor not in EXECUTORS:
        raise StructureError(f"executor {executor!r} not among {', '.join(EXECUTORS)}")
    ways = {"local": _here if workers == 0 else _processes, "ray": _ray}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("running", total=done + len(jobs), completed=done)
        for job, result in ways[executor](partial(_call, function, tuple(imports)), jobs, workers) if jobs else ():
            progress.update(task, advance=1, description=describe(job))
            yield job, result


def import_all(names: Sequence[str]) -> None:
    """Import modules, also from the folder of the command.

    Raises:
        StructureError: There is no such module.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise StructureError(f"cannot import {name!r}: {error}") from error


def _call(function: Callable[[Job], Result], imports: Sequence[str], job: Job) -> Result:
    import_all(imports)
    return function(job)


def _here(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int | None) -> Iterator[tuple[Job, Result]]:
    for job in jobs:
        yield job, function(job)


def _processes(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int | None
) -> Iterator[tuple[Job, Result]]:
    before = set(multiprocessing.active_children())
    count = min(workers or os.cpu_count() or 1, len(jobs))
    executor = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=prepare_worker)
    try:
        futures = {executor.submit(function, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        message = "a worker was ended from outside (for want of memory?); what was finished is kept, so run this again"
        raise WorkerError(message) from error
    except BaseException:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()  # else the end would wait for the jobs that run
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _ray(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int | None) -> Iterator[tuple[Job, Result]]:
    try:
        import ray
    except ImportError as error:
        raise StructureError("--executor ray needs Ray: pip install 'structops[ray]'") from error
    started = not ray.is_initialized()
    if started:
        # At Ray's own niceness of 15, its workers wait for whatever else the machine does.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # How large a cluster is that others have started is not for us to say.
        size: dict[str, Any] = (
            {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers or None, "include_dashboard": False}
        )
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **size)
    try:
        remote: Any = ray.remote(max_retries=0)(_apply)
        waiting = {remote.remote(function, job): job for job in jobs}
        while waiting:
            (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
            yield waiting.pop(ready), ray.get(ready)
    finally:
        if started:
            ray.shutdown()


def _apply(function: Callable[[Job], Result], job: Job) -> Result:
    """A function for Ray, which takes no partial ones."""
    return function(job)


def prepare_worker() -> None:
    """One thread in either library; interrupts are for the parent, and its end is that of its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    if find_spec("torch") is not None:
        import torch

        torch.set_num_threads(1)
        if torch.cuda.is_available():  # processes that start together have numbers that follow each other
            torch.cuda.set_device(os.getpid() % torch.cuda.device_count())
    if (parent := multiprocessing.parent_process()) is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
