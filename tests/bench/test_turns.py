"""Loads of the benchmark that take turns."""

from __future__ import annotations

import subprocess
import sys
import threading
from functools import partial
from itertools import pairwise

import psutil
import pytest

from tandem_bench.turns import Load, in_turns

# Says forty times what time it is.
_CLOCK = """
import time
for _ in range(40):
    print(time.perf_counter(), flush=True)
    time.sleep(0.01)
"""


def _clock() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", _CLOCK], stdout=subprocess.PIPE, text=True)


def _read(process: subprocess.Popen[str]) -> list[float]:
    return [float(line) for line in process.communicate()[0].splitlines()]


def test_only_one_load_goes_on_at_a_time() -> None:
    clocks = [_clock() for _ in range(2)]
    loads = [Load(partial(_read, c), lambda c=c: [psutil.Process(c.pid)]) for c in clocks]
    for load in loads:
        load.suspend()
    stamps = in_turns(loads, 0.1)
    assert [len(found) for found in stamps] == [40, 40]

    merged = sorted((moment, number) for number, found in enumerate(stamps) for moment in found)
    order = [number for _, number in merged]
    switches = sum(a != b for a, b in pairwise(order))
    assert 2 <= switches < 40  # side by side it would be nearly all 79
    own = sum(
        load.own_seconds(found[-1]) - load.own_seconds(found[0])
        for load, found in zip(loads, stamps, strict=True)
    )
    assert own <= merged[-1][0] - merged[0][0]


def test_a_load_that_fails_lets_the_others_finish() -> None:
    """Else one that is begun again would meet its first self."""

    def fail() -> list[float]:
        raise RuntimeError("it failed")

    clock, stamps = _clock(), []
    process = psutil.Process(clock.pid)
    loads = [Load(lambda: stamps.extend(_read(clock)), lambda: [process]), Load(fail, list)]
    with pytest.raises(RuntimeError, match="it failed"):
        in_turns(loads, 0.05)
    assert len(stamps) == 40


def test_what_interrupts_waits_for_no_load_and_leaves_none_suspended() -> None:
    def interrupt() -> list[psutil.Process]:
        raise KeyboardInterrupt

    clock, never = _clock(), threading.Event()
    process = psutil.Process(clock.pid)
    loads = [Load(never.wait, lambda: [process]), Load(never.wait, interrupt)]
    with pytest.raises(KeyboardInterrupt):
        in_turns(loads, 0.05)
    assert len(_read(clock)) == 40
    never.set()
