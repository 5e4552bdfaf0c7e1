"""The same load through Triton and gRPC, sent by NVIDIA's perf_analyzer, against the engine alone.

Server and engine are both loaded and are measured in turns. perf_analyzer keeps `concurrency`
requests in flight, or so it should. Throughput is that while new requests came.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tandem_bench.figures import Trace, summary, sustained
from tandem_bench.noise import undisturbed
from tandem_bench.settings import Settings, bar, turned
from tandem_bench.worker import Worker, WorkerError
from tandem_bench.workload import ROOT, repeat_to_fill
from triton_runtime import TRITON
from triton_server import TritonServer

PART = "triton"
_LOGS = ROOT / ".bench"
# perf_analyzer 2.51 now and then ends before its profile is written to the end.
_ATTEMPTS = 5
# Requests are a multiple of those in flight.
_WAVES = 4
_ENGINE, _TRITON = "engine alone", "through Triton"


def run(settings: Settings) -> None:
    """Measures what is not in `triton.json` yet."""
    results = settings.results(PART, ("num_prompts", "max_tokens"))
    todo = [
        (way, drafter, concurrency, number)
        for number in range(settings.rounds)
        for concurrency in settings.concurrencies
        for drafter in settings.drafters
        for way in turned((_ENGINE, _TRITON), number)
        if key(way, drafter, concurrency, number) not in results
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
                load: list[list[int]], way: str, drafter: str, concurrency: int
            ) -> dict[str, Any]:
                work = (
                    partial(_alone, engine, load, drafter, concurrency, settings)
                    if way == _ENGINE
                    else partial(
                        perf_analyzer, server, load, drafter, concurrency, settings, Path(scratch)
                    )
                )
                traces, surroundings = undisturbed(work)
                seconds = max(t.times[-1] for t in traces) - min(t.sent for t in traces)
                return {**summary(traces, seconds), **sustained(traces), **surroundings}

            for way in (_ENGINE, _TRITON):
                for drafter in settings.drafters:
                    shown.say(f"warming up {way}, {drafter}")
                    measure(prompts[:4], way, drafter, 1)
            for way, drafter, concurrency, number in todo:
                shown.say(f"{way}, {drafter}, concurrency {concurrency}, round {number + 1}")
                name = key(way, drafter, concurrency, number)
                load = repeat_to_fill(prompts, _WAVES * concurrency)
                results.put(name, measure(load, way, drafter, concurrency))
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


def _alone(
    engine: Worker, prompts: list[list[int]], drafter: str, concurrency: int, settings: Settings
) -> list[Trace]:
    answer = engine.ask(
        prompts=prompts,
        max_tokens=settings.max_tokens,
        concurrency=concurrency,
        drafter=drafter,
    )
    return [Trace(**trace) for trace in answer["traces"]]


def perf_analyzer(
    server: TritonServer,
    prompts: list[list[int]],
    drafter: str,
    concurrency: int,
    settings: Settings,
    scratch: Path,
) -> list[Trace]:
    """Sends each prompt once; when its responses came, from the profile that is exported.

    Raises:
        WorkerError: perf_analyzer failed, or requests are missing in its profile.
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
    command = [str(TRITON / "bin" / "perf_analyzer"), "-m", "tandem", "-u", server.grpc_url]
    command += ["-i", "grpc", "--streaming", "--async", "--input-data", str(inputs)]
    command += ["--concurrency-range", str(concurrency), "--request-count", str(len(prompts))]
    command += ["--profile-export-file", str(export)]
    for _ in range(_ATTEMPTS):
        export.unlink(missing_ok=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not export.exists():
            # What it says at first; how it is used comes behind.
            raise WorkerError(f"perf_analyzer failed: {done.stderr[:1500]}{done.stdout[:1500]}")
        with suppress(json.JSONDecodeError):
            profile = json.loads(export.read_text(encoding="utf-8"))
            requests = profile["experiments"][0]["requests"]
            return [_trace(request, settings.max_tokens) for request in requests]
    raise WorkerError(f"perf_analyzer left {_ATTEMPTS} profiles unfinished")


def _trace(request: dict[str, Any], num_tokens: int) -> Trace:
    """When a request was sent and its responses came; only the whole count of tokens is known."""
    times = [stamp / 1e9 for stamp in request["response_timestamps"]]
    counts = [1] * (len(times) - 1)
    return Trace(request["timestamp"] / 1e9, times, [*counts, num_tokens - sum(counts)], [])
