"""Times of several ways to compute the same thing, taken in turn."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

MOST_CALLS = 100_000


@dataclass(frozen=True)
class Timing:
    """The times of one contestant.

    Attributes:
        calls: Calls that one timing consists of.
        seconds: Seconds a call in every round; the same round of two contestants lies close together in time.
    """

    calls: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds a call."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """Seconds a call of the fastest round: the one least disturbed."""
        return min(self.seconds)


def ratio(slower: Timing, faster: Timing) -> float:
    """How many times faster the second is: the median over rounds of the ratio within the round."""
    return statistics.median(a / b for a, b in zip(slower.seconds, faster.seconds, strict=True))


def alternate(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    min_seconds: float,
    wait: Callable[[], Any] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every contestant once in every round, each round in another order, the same in every run.

    Whoever comes after a large dense product finds cold caches; so nobody always follows the same one.

    Args:
        contestants: What to call, by name.
        repeats: Rounds.
        min_seconds: A timing makes as many calls as it takes to last this long.
        wait: Called before the clock is read: waits for what a device still computes.
        clock: Gives the time in seconds.
    """
    calls = {name: _calls(run, min_seconds, wait, clock) for name, run in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    with _no_garbage_collection():
        for turn in range(repeats):
            for name in random.Random(turn).sample(names, len(names)):
                seconds[name].append(_time(contestants[name], calls[name], wait, clock))
    return {name: Timing(calls[name], tuple(times)) for name, times in seconds.items()}


def _calls(run: Callable[[], Any], least: float, wait: Callable[[], Any], clock: Callable[[], float]) -> int:
    """Warm up, doubling the calls until they last a good part of ``least``; calls that then last all of it."""
    calls = 1
    _time(run, calls, wait, clock)  # the first call may set up what later ones use
    while (taken := calls * _time(run, calls, wait, clock)) < least / 4 and calls < MOST_CALLS:
        calls *= 2
    return min(MOST_CALLS, max(1, math.ceil(calls * least / taken))) if taken > 0 else MOST_CALLS


def _time(run: Callable[[], Any], calls: int, wait: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Seconds a call."""
    wait()
    start = clock()
    for _ in range(calls):
        run()
    wait()
    return (clock() - start) / calls


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect before, not meanwhile."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
