"""Tandem against its peers: the same prompts, lengths and type, in turns, each in its own process.

A round runs every system once on all prompts; the next round begins with another system. All
processes stay loaded from beginning to end; what those that wait burn of the CPU is recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil

from tandem import EngineConfig
from tandem_bench.figures import Trace, agreement, summary
from tandem_bench.install_peers import VENV as VLLM_VENV
from tandem_bench.install_peers import iomp, tcmalloc
from tandem_bench.noise import cpu_seconds, undisturbed
from tandem_bench.settings import Bar, Settings, bar, turned
from tandem_bench.worker import Worker, WorkerError
from tandem_bench.workload import repeat_to_fill
from tandem_runtime.paths import ROOT

PART = "peers"
_LOGS = ROOT / ".bench"
# Each peer's best number of tokens to guess, tried on these prompts.
_HF_LOOKUP_TOKENS = 10
_VLLM_NGRAM_TOKENS = 4
_MAX_MODEL_LEN = 2048


@dataclass(frozen=True)
class System:
    """Something that is measured: a worker and what it is asked to do."""

    name: str
    worker: str
    options: dict[str, Any] = field(default_factory=dict)
    alone: bool = False  # runs one request at a time, whatever it is given

    def runs_at(self, concurrency: int) -> bool:
        """Whether the system can be measured at this concurrency."""
        return concurrency == 1 or not self.alone


HF = [
    System("HF generate", "hf", {"mode": "plain"}),
    System("HF prompt lookup", "hf", {"mode": "prompt_lookup"}, alone=True),
]
VLLM = [System("vLLM", "vllm"), System("vLLM n-gram", "vllm-ngram")]
REFERENCE = HF[0]


def tandem_systems(drafters: tuple[str, ...]) -> list[System]:
    """Tandem with each drafter."""
    return [System(f"Tandem {drafter}", "tandem", {"drafter": drafter}) for drafter in drafters]


def run(settings: Settings) -> None:
    """Measures what is not in `peers.json` yet."""
    systems = [*tandem_systems(settings.drafters), *HF]
    if (VLLM_VENV / ".stamp").exists():
        systems += VLLM
    else:
        print("vLLM is not in .vllm, so it is not compared with: run `make bench-peers` for it")
    results = settings.results(
        PART,
        ("num_prompts", "max_tokens"),
        hf_lookup_tokens=_HF_LOOKUP_TOKENS,
        vllm_ngram_tokens=_VLLM_NGRAM_TOKENS,
    )
    by_name = {system.name: system for system in systems}
    todo = [
        (by_name[name], concurrency, number)
        for number in range(settings.rounds)
        for concurrency in settings.concurrencies
        for name in turned([s.name for s in systems if s.runs_at(concurrency)], number)
        if key(name, concurrency, number) not in results
    ]
    if not todo:
        return
    config = EngineConfig.from_json(settings.config)
    prompts = settings.prompts()
    with (
        bar(PART, len(todo), results) as shown,
        start({system.worker for system, _, _ in todo}, config, settings, shown) as workers,
    ):
        for name, worker in workers.items():
            results.put(f"about {name}", worker.about)
        warm_up(workers, systems, prompts, settings, shown)
        if "reference" not in results:
            shown.say(f"the reference: {REFERENCE.name}, one at a time")
            done = ask(workers, REFERENCE, prompts, 1, settings)
            results.put("reference", [trace.token_ids for trace in done.traces])
        for system, concurrency, number in todo:
            shown.say(f"{system.name}, concurrency {concurrency}, round {number + 1}")
            load = repeat_to_fill(prompts, concurrency)
            done, surroundings = undisturbed(
                partial(ask, workers, system, load, concurrency, settings),
            )
            answers = [trace.token_ids for trace in done.traces[: len(prompts)]]
            results.put(
                key(system.name, concurrency, number),
                {
                    **summary(done.traces, done.seconds),
                    "others_cpu_share": round(done.others_cpu_share, 4),
                    **surroundings,
                    "against_reference": agreement(answers, results.cells["reference"]),
                },
            )
            shown.advance()


def key(name: str, concurrency: int, number: int) -> str:
    """The name of one measurement."""
    return f"{name} c{concurrency} r{number}"


@dataclass(frozen=True)
class Answer:
    """What one system did with one load."""

    traces: list[Trace]
    seconds: float
    others_cpu_share: float  # of one core, by the peers that wait


def ask(
    workers: dict[str, Worker],
    system: System,
    prompts: list[list[int]],
    concurrency: int,
    settings: Settings,
) -> Answer:
    """Runs one system on the prompts while the others wait."""
    others = [worker for name, worker in workers.items() if name != system.worker]
    before = sum(cpu_seconds(worker.pid) for worker in others)
    answer = workers[system.worker].ask(
        prompts=prompts,
        max_tokens=settings.max_tokens,
        concurrency=concurrency,
        **system.options,
    )
    burnt = sum(cpu_seconds(worker.pid) for worker in others) - before
    traces = [Trace(**trace) for trace in answer["traces"]]
    wrong = [t.num_tokens for t in traces if t.num_tokens != settings.max_tokens]
    if wrong or len(traces) != len(prompts):
        raise WorkerError(
            f"{system.name}: {len(prompts)} prompts of {settings.max_tokens} tokens were asked "
            f"for; {len(traces)} came, of which these differ in length: {wrong}"
        )
    return Answer(traces, answer["seconds"], burnt / answer["seconds"])


@contextmanager
def start(
    names: set[str], config: EngineConfig, settings: Settings, shown: Bar
) -> Iterator[dict[str, Worker]]:
    """Starts the workers that are needed; all are ready inside and ended afterwards."""
    most = str(max(settings.concurrencies))
    module = "tandem_bench.peers"
    vllm = [str(VLLM_VENV / "bin/python"), "-m", f"{module}.vllm", config.verifier]
    vllm += ["--max-num-seqs", most, "--max-model-len", str(_MAX_MODEL_LEN)]
    ngram = ["--num-ngram-tokens", str(_VLLM_NGRAM_TOKENS)]
    commands = {
        "tandem": [
            *(sys.executable, "-m", f"{module}.tandem", str(settings.config)),
            *("--max-num-seqs", most),
        ],
        "hf": [
            *(sys.executable, "-m", f"{module}.hf", config.verifier),
            *("--num-lookup-tokens", str(_HF_LOOKUP_TOKENS)),
        ],
        "vllm": vllm,
        "vllm-ngram": [*vllm, *ngram],
    }
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in sorted(names):
            shown.say(f"loading {name}" + " (minutes)" * name.startswith("vllm"))
            environment = vllm_environment() if name.startswith("vllm") else {}
            worker = Worker(name, commands[name], environment, _LOGS / f"{name}.log")
            # One after the other: each takes the memory that it finds.
            workers[name] = stack.enter_context(worker)
        yield workers


def vllm_environment() -> dict[str, str]:
    """The best settings for vLLM on a CPU: all cores for products, Intel's OpenMP, tcmalloc."""
    return {
        "PYTHONPATH": str(ROOT / "python_backend"),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(psutil.cpu_count() or 1) - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "LD_PRELOAD": ":".join(str(path) for path in (iomp(), tcmalloc()) if path),
    }


def warm_up(
    workers: dict[str, Worker],
    systems: list[System],
    prompts: list[list[int]],
    settings: Settings,
    shown: Bar,
) -> None:
    """Runs every system shortly, at the lowest and the highest concurrency."""
    short = Settings(max_tokens=16)
    for system in systems:
        for concurrency in {min(settings.concurrencies), max(settings.concurrencies)}:
            if system.worker in workers and system.runs_at(concurrency):
                shown.say(f"warming up {system.name} at {concurrency}")
                ask(workers, system, repeat_to_fill(prompts[:1], concurrency), concurrency, short)
