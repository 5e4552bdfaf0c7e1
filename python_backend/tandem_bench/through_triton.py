"""The same load through Triton and gRPC, sent by NVIDIA's perf_analyzer, against the engine alone.

Server and engine are both loaded, and take turns of a few seconds while they are measured; the time
in which one waited for the other is left out. perf_analyzer keeps `concurrency` requests in flight,
or so it should. Throughput is that while new requests came.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tandem_bench.figures import Trace, summary, sustained
from tandem_bench.noise import undisturbed
from tandem_bench.settings import Settings, bar, turned
from tandem_bench.turns import Load, in_turns
from tandem_bench.worker import Worker, WorkerError
from tandem_bench.workload import repeat_to_fill
from tandem_runtime.paths import ROOT
from tandem_runtime.server import TritonServer
from tandem_runtime.triton import TRITON

PART = "triton"
_LOGS = ROOT / ".bench"
_PERF_ANALYZER = TRITON / "bin" / "perf_analyzer"
# perf_analyzer 2.51 now and then ends before its profile is written to the end.
_ATTEMPTS = 5
# Requests are such a multiple of those in flight: the first come all at once, so their first tokens
# wait for one another, which shows how a burst happens to be grouped.
_WAVES = 10
# Short, as memory changes its speed. What waits in the server to be sent is all overdue after a
# turn of the engine, so not shorter.
_TURN_SECONDS = 3.0
_ENGINE, _TRITON = "engine alone", "through Triton"


def run(settings: Settings) -> None:
    """Measures what is not in `triton.json` yet."""
    results = settings.results(PART, ("num_prompts", "max_tokens"))
    todo = [
        (drafter, concurrency, number)
        for number in range(settings.rounds)
        for concurrency in settings.concurrencies
        for drafter in settings.drafters
        if key(_ENGINE, drafter, concurrency, number) not in results
        or key(_TRITON, drafter, concurrency, number) not in results
    ]
    if not todo:
        return
    prompts = settings.prompts()
    with bar(PART, len(todo), results) as shown, tempfile.TemporaryDirectory() as scratch:
        shown.say("loading")
        command = [sys.executable, "-m", "tandem_bench.peers.tandem", str(settings.config)]
        command += ["--max-num-seqs", str(max(settings.concurrencies))]
        repository = write_repository(Path(scratch), settings)
        with (
            Worker("tandem", command, {}, _LOGS / "engine.log") as engine,
            TritonServer(repository, log_file=_LOGS / "triton.log") as server,
        ):

            def measure(
                load: list[list[int]], drafter: str, concurrency: int, number: int
            ) -> dict[str, dict[str, Any]]:
                common = (load, drafter, concurrency, settings)
                loads = {
                    _ENGINE: Load(partial(_alone, engine, *common), partial(_tree, engine.pid)),
                    _TRITON: Load(
                        partial(_perf_analyzer, server, *common, Path(scratch)),
                        partial(_server_and_client, server),
                    ),
                }
                ways = turned(tuple(loads), number)
                traces, surroundings = undisturbed(partial(_both, [loads[way] for way in ways]))
                return {
                    way: {**_figures(found), **surroundings}
                    for way, found in zip(ways, traces, strict=True)
                }

            for drafter in settings.drafters:
                shown.say(f"warming up, {drafter}")
                measure(prompts[:4], drafter, 1, 0)
            for drafter, concurrency, number in todo:
                shown.say(f"{drafter}, concurrency {concurrency}, round {number + 1}")
                load = repeat_to_fill(prompts, _WAVES * concurrency)
                for way, cell in measure(load, drafter, concurrency, number).items():
                    results.put(key(way, drafter, concurrency, number), cell)
                shown.advance()


def key(way: str, drafter: str, concurrency: int, number: int) -> str:
    """The name of one measurement."""
    return f"{way} {drafter} c{concurrency} r{number}"


def write_repository(directory: Path, settings: Settings) -> Path:
    """The repository that is served by default, with room for the highest concurrency."""
    source = settings.config.parents[1]
    model = directory / "repository" / source.name
    (model / "1").mkdir(parents=True)
    shutil.copy(source / "config.pbtxt", model)
    values = json.loads(settings.config.read_text(encoding="utf-8"))
    config = settings.engine_config()
    values["verifier"] = config.verifier
    values["drafters"] = config.drafters
    values["max_num_seqs"] = config.max_num_seqs
    values["enable_prefix_caching"] = config.enable_prefix_caching
    (model / "1" / "model.json").write_text(json.dumps(values), encoding="utf-8")
    return directory / "repository"


def _both(loads: list[Load[list[Trace]]]) -> list[list[Trace]]:
    """Does the work of both, and times it by how long it was each one's turn."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            found = in_turns(loads, _TURN_SECONDS)
            break
        except json.JSONDecodeError:
            if attempt == _ATTEMPTS:
                raise WorkerError(f"perf_analyzer left {attempt} profiles unfinished") from None
    return [
        [_by_own_clock(trace, load) for trace in traces]
        for load, traces in zip(loads, found, strict=True)
    ]


def _by_own_clock(trace: Trace, load: Load[list[Trace]]) -> Trace:
    times = [load.own_seconds(moment) for moment in trace.times]
    return Trace(load.own_seconds(trace.sent), times, trace.counts, [])


def _figures(traces: list[Trace]) -> dict[str, Any]:
    seconds = max(trace.times[-1] for trace in traces) - min(trace.sent for trace in traces)
    return {**summary(traces, seconds), **sustained(traces)}


def _tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _server_and_client(server: TritonServer) -> list[psutil.Process]:
    own = psutil.Process().children()
    clients = [process for process in own if process.name() == _PERF_ANALYZER.name]
    return [*clients, *_tree(server.pid)]


def _alone(
    engine: Worker, prompts: list[list[int]], drafter: str, concurrency: int, settings: Settings
) -> list[Trace]:
    """Traces by `time.perf_counter`."""
    answer = engine.ask(
        prompts=prompts,
        max_tokens=settings.max_tokens,
        concurrency=concurrency,
        drafter=drafter,
    )
    return [_moved(Trace(**trace), answer["started_at"]) for trace in answer["traces"]]


def _perf_analyzer(
    server: TritonServer,
    prompts: list[list[int]],
    drafter: str,
    concurrency: int,
    settings: Settings,
    scratch: Path,
) -> list[Trace]:
    """Sends each prompt once; traces by `time.perf_counter`, from the profile that is exported.

    Raises:
        WorkerError: perf_analyzer failed.
        json.JSONDecodeError: its profile has no end.
    """
    options = {"max_tokens": settings.max_tokens, "temperature": 0.0, "ignore_eos": True}
    data = [
        {
            "input_ids": {"content": prompt, "shape": [len(prompt)]},
            "sampling_parameters": [json.dumps({**options, "drafter": drafter})],
            "stream": [True],
        }
        for prompt in prompts
    ]
    inputs, export = scratch / "inputs.json", scratch / "profile.json"
    inputs.write_text(json.dumps({"data": data}), encoding="utf-8")
    command = [str(_PERF_ANALYZER), "-m", "tandem", "-u", server.grpc_url]
    command += ["-i", "grpc", "--streaming", "--async", "--input-data", str(inputs)]
    command += ["--concurrency-range", str(concurrency), "--request-count", str(len(prompts))]
    # Each of its threads sends an equal part of the requests: those that are done first would leave
    # their places empty.
    command += ["--max-threads", "1"]
    command += ["--profile-export-file", str(export)]
    export.unlink(missing_ok=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not export.exists():
        # What it says at first; how it is used comes behind.
        raise WorkerError(f"perf_analyzer failed: {done.stderr[:1500]}{done.stdout[:1500]}")
    profile = json.loads(export.read_text(encoding="utf-8"))
    its_clock_less_ours = time.time() - time.perf_counter()
    return [
        _moved(_trace(request, settings.max_tokens), -its_clock_less_ours)
        for request in profile["experiments"][0]["requests"]
    ]


def _trace(request: dict[str, Any], num_tokens: int) -> Trace:
    """When a request was sent and its responses came; only the whole count of tokens is known."""
    times = [stamp / 1e9 for stamp in request["response_timestamps"]]
    counts = [1] * (len(times) - 1)
    return Trace(request["timestamp"] / 1e9, times, [*counts, num_tokens - sum(counts)], [])


def _moved(trace: Trace, seconds: float) -> Trace:
    times = [moment + seconds for moment in trace.times]
    return Trace(trace.sent + seconds, times, trace.counts, trace.token_ids)
