"""Where the time of a step goes: torch's profiler over steps in which all sequences decode.

Times are of the thread that steps. A product's time is how long its outermost operator took, from
profiled steps; a step's time is from steps without the profiler, in short turns with those. So
neither the profiler's own cost nor a memory whose speed changes from second to second gets into the
share outside the products, `1 - products / step`. The groups come from a third set of steps, in
which each module opens a range of its own: an operator belongs to the innermost module around it.
"""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import ExitStack, contextmanager
from operator import itemgetter
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.profiler import ProfilerActivity, profile, record_function

from tandem import Engine, SamplingParams
from tandem.cpu.kernels import LikeliestToken
from tandem.metrics import EngineStats
from tandem_bench.noise import foreign_share, read_rate
from tandem_bench.settings import Settings, bar
from tandem_bench.workload import repeat_to_fill

_WARM_UP_STEPS = 6
# With the profiler and without, in turns.
_NUM_TURNS, _STEPS_A_TURN = 8, 8
_PHASE, _GROUP = "phase:", "group:"
# Matrix products: linear layers, attention, the head, and what a drafter multiplies.
PRODUCT = re.compile(
    r"tandem::(paged_attention|attend|likeliest|multiply)|mkldnn::_linear_pointwise|onednn::.*|"
    r"aten::(linear|addmm|mm|bmm|matmul|baddbmm|mkldnn_linear|scaled_dot_product_attention|"
    r"_weight_int8pack_mm|_weight_int4pack_mm.*|_scaled_mm)"
)
# Kernels that torch's profiler doesn't know.
_KERNELS = {"tandem::likeliest": LikeliestToken}
_GROUP_OF_OPERATOR = (
    (
        re.compile(r"tandem::(paged_attention|attend)|aten::(_?scaled_dot_product.*|_fused_sdp.*)"),
        "attention products",
    ),
    (re.compile(r"tandem::likeliest"), "head"),
    (re.compile(r"tandem::write_kv|aten::index_copy_"), "K/V write"),
    # In a graph no module is called.
    (re.compile(r"tandem::(linear|multiply)"), "linear layers"),
)
_GROUP_OF_CLASS = (
    ("Linear", "linear layers"),
    ("Norm", "norms"),
    ("Rotary", "rotary embedding"),
    ("Embedding", "token embedding"),
    ("Attention", "attention but its products"),
    ("MLP", "MLP but its products"),
)
_REST = {
    "schedule": "schedule",
    "draft": "other",
    "verify": "residuals and inputs",
    "accept": "sampling",
    "commit": "commit",
}


class _MarkedStats(EngineStats):
    """Opens a range of the profiler for each phase."""

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        with record_function(_PHASE + phase), super().time(phase):
            yield


PART = "profile"
_SHARE = "share_outside_products"


def run(settings: Settings) -> None:
    """Profiles what is not in `profile.json` yet."""
    results = settings.results(PART, ())
    todo = [
        (drafter, concurrency)
        for concurrency in settings.concurrencies
        for drafter in settings.drafters
        if f"{drafter} c{concurrency}" not in results
    ]
    if not todo:
        return
    with bar(PART, len(todo), results) as shown:
        shown.say("loading")
        engine = Engine(settings.engine_config())
        prompts = settings.prompts()
        for drafter, concurrency in todo:
            shown.say(f"{drafter}, concurrency {concurrency}")
            load = repeat_to_fill(prompts, concurrency)[:concurrency]
            rounds = [profile_steps(engine, load, drafter) for _ in range(settings.rounds)]
            results.put(f"{drafter} c{concurrency}", _middle(rounds))
            shown.advance()


def _middle(rounds: Items[dict[str, Any]]) -> dict[str, Any]:
    """The one whose share outside the products is the median, and the shares of all."""
    ordered = sorted(rounds, key=itemgetter(_SHARE))
    return ordered[(len(rounds) - 1) // 2] | {"shares": [each[_SHARE] for each in ordered]}


def profile_steps(engine: Engine, prompts: Items[list[int]], drafter: str) -> dict[str, Any]:
    """Decodes all prompts at once and says where the time went.

    Returns:
        Milliseconds a step: `step_ms`, `products_ms`, `phases` (without the profiler), `groups`
        (operators by phase and kind), `python_ms` (no operator was running: Python, and what a
        graph computes between them), `top_operators`; and
        `share_outside_products`.
    """
    # Its library reports each start and stop otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    params = SamplingParams(max_tokens=engine.max_model_len, temperature=0.0, ignore_eos=True)
    sequences = [engine.make_sequence(prompt, params, drafter=drafter) for prompt in prompts]
    for sequence in sequences:
        engine.add(sequence)
    while not all(sequence.is_decoding for sequence in sequences):
        engine.step()
    marked, plain = _MarkedStats(), engine.stats
    engine.stats = marked

    def steps(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            engine.step()
        return time.perf_counter() - start

    try:
        steps(_WARM_UP_STEPS)
        marked.phases.clear()
        rate, foreign = read_rate(), foreign_share()
        seconds = profiled_seconds = 0.0
        phases, events = list[tuple[str, float]](), list[FunctionEvent]()
        for _ in range(_NUM_TURNS):
            marked.phases.clear()
            seconds += steps(_STEPS_A_TURN)
            phases += marked.phases
            with _named_kernels(), profile(activities=[ProfilerActivity.CPU]) as profiler:
                profiled_seconds += steps(_STEPS_A_TURN)
            events += profiler.events()
        share = foreign()
        with (
            _named_kernels(),
            _module_ranges(engine),
            profile(activities=[ProfilerActivity.CPU]) as by_module,
        ):
            steps(_STEPS_A_TURN)
        assert all(sequence.is_decoding for sequence in sequences), "a sequence ended too early"
    finally:
        engine.stats = plain
        for sequence in sequences:
            engine.cancel(sequence)
        engine.step()
    num_steps = _NUM_TURNS * _STEPS_A_TURN
    per_step = 1e3 / num_steps
    products = sum(e.cpu_time_total for e in events if _is_outermost(e, PRODUCT)) / 1e6
    operators = sum(e.cpu_time_total for e in events if _is_outermost(e, _OPERATOR)) / 1e6
    return {
        "foreign_cpu_share": share,
        "read_gb_per_second": rate,
        "step_ms": round(seconds * per_step, 3),
        "profiled_step_ms": round(profiled_seconds * per_step, 3),
        "products_ms": round(products * per_step, 3),
        _SHARE: round(1 - products / seconds, 4),
        "python_ms": round((seconds - operators) * per_step, 3),
        "profiled_python_ms": round((profiled_seconds - operators) * per_step, 3),
        "phases": _rounded(_sum(phases), per_step),
        "phase_operators": _rounded(_operators_by_phase(events), per_step),
        "groups": _rounded(_groups(list(by_module.events())), 1e3 / _STEPS_A_TURN),
        "top_operators": _top(events, num_steps),
        "num_tokens_a_sequence": round(
            sum(sequence.num_tokens for sequence in sequences) / len(sequences), 1
        ),
    }


_OPERATOR = re.compile(rf"(?!{_PHASE}|{_GROUP}|ProfilerStep).*")


def _is_outermost(event: FunctionEvent, pattern: re.Pattern[str]) -> bool:
    if not pattern.fullmatch(event.name):
        return False
    parent = event.cpu_parent
    while parent is not None:
        if pattern.fullmatch(parent.name):
            return False
        parent = parent.cpu_parent
    return True


def _ancestor(event: FunctionEvent, prefix: str) -> str | None:
    parent: FunctionEvent | None = event
    while parent is not None:
        if parent.name.startswith(prefix):
            return str(parent.name.removeprefix(prefix))
        parent = parent.cpu_parent
    return None


def _sum(phases: Items[tuple[str, float]]) -> dict[str, float]:
    seconds = defaultdict[str, float](float)
    for phase, duration in phases:
        seconds[phase] += duration
    return seconds


def _operators_by_phase(events: Items[FunctionEvent]) -> dict[str, float]:
    seconds = defaultdict[str, float](float)
    for event in events:
        if _is_outermost(event, _OPERATOR):
            seconds[_ancestor(event, _PHASE) or "between phases"] += event.cpu_time_total / 1e6
    return seconds


def _groups(events: Items[FunctionEvent]) -> dict[str, float]:
    """Seconds of the operators by phase and kind."""
    seconds = defaultdict[str, float](float)
    for event in events:
        if event.name.startswith((_PHASE, _GROUP)):
            continue
        phase = _ancestor(event, _PHASE) or "between phases"
        seconds[f"{phase}: {_kind(event, phase)}"] += event.self_cpu_time_total / 1e6
    return seconds


def _kind(event: FunctionEvent, phase: str) -> str:
    outer: FunctionEvent | None = event
    while outer is not None and not outer.name.startswith(_GROUP):
        for pattern, group in _GROUP_OF_OPERATOR:
            if pattern.fullmatch(outer.name):
                return group
        outer = outer.cpu_parent
    if outer is not None:
        return str(outer.name.removeprefix(_GROUP))
    return _REST.get(phase, "other")


@contextmanager
def _named_kernels() -> Iterator[None]:
    """Makes operators of what is not torch's."""
    with ExitStack() as stack:
        for name, kind in _KERNELS.items():
            run = kind.__call__

            def named(*args: Any, name: str = name, run: Any = run) -> Any:
                with record_function(name):
                    return run(*args)

            stack.enter_context(patch.object(kind, "__call__", named))
        yield


@contextmanager
def _module_ranges(engine: Engine) -> Iterator[None]:
    """Opens a range of the profiler for each call of a module that has a group."""
    head = engine.verifier.model.get_output_embeddings()
    ranges: list[Any] = []

    def enter(module: torch.nn.Module, args: Any) -> None:
        group = next((g for part, g in _GROUP_OF_CLASS if part in type(module).__name__), None)
        if module is head:
            group = "head"
        ranges.append(group and record_function(_GROUP + group))
        if group:
            ranges[-1].__enter__()

    def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
        opened = ranges.pop()
        if opened:
            opened.__exit__(None, None, None)

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _top(events: Items[FunctionEvent], num_steps: int, count: int = 20) -> list[dict[str, Any]]:
    seconds, calls = defaultdict[str, float](float), defaultdict[str, int](int)
    for event in events:
        if _OPERATOR.fullmatch(event.name):
            seconds[event.name] += event.self_cpu_time_total / 1e6
            calls[event.name] += 1
    return [
        {
            "operator": name,
            "self_ms": round(1e3 * value / num_steps, 3),
            "calls": round(calls[name] / num_steps, 1),
        }
        for name, value in _descending(seconds)[:count]
    ]


def _rounded(seconds: dict[str, float], per_step: float) -> dict[str, float]:
    return {name: round(value * per_step, 3) for name, value in _descending(seconds)}


def _descending(seconds: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(seconds.items(), key=lambda item: -item[1])
