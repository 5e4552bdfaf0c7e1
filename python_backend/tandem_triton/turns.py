"""How Linux shares the processor between the thread that computes and those that answer."""

from __future__ import annotations

import ctypes
import logging
import platform
import sys

logger = logging.getLogger("tandem")

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_SCHED_OTHER = 0
# The longest turn that Linux grants.
_TURN_NANOSECONDS = 100_000_000


class _Attributes(ctypes.Structure):
    """Linux' `struct sched_attr`, in its first version."""

    _fields_ = [
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    ]


def take_long_turns() -> None:
    """Lets whoever wakes up interrupt this thread and those that it starts, such as OpenMP's.

    They ask for long turns, and since 6.12 Linux lets a thread with a shorter turn go first. Else
    a response, on its way through several threads, would wait for the end of a turn in each, some
    milliseconds every time, where computing keeps all cores busy. The share of the processor stays
    the same. Elsewhere nothing changes.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if not sys.platform.startswith("linux") or number is None:
        return
    attributes = _Attributes(policy=_SCHED_OTHER, runtime=_TURN_NANOSECONDS)
    attributes.size = ctypes.sizeof(attributes)
    if ctypes.CDLL(None, use_errno=True).syscall(number, 0, ctypes.byref(attributes), 0) != 0:
        logger.debug("the computing thread keeps its usual turns: errno %d", ctypes.get_errno())
