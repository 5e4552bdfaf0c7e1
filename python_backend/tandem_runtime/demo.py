"""Starts a server, sends it real prompts with speculation and without, compares, and chats."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from tandem_client import Client, Completion, Options, TandemClientError
from tandem_client.cli import follow, ignore, printer, summary
from tandem_runtime.paths import ROOT
from tandem_runtime.server import ONE_BY_ONE, ServerError, TritonServer

MODEL_REPOSITORY = ROOT / "model_repository"
CHAT_MODEL = "tandem_chat"
QUESTION = "What is the capital of France, and what is it known for?"
MAX_TOKENS = 96
REPEATS = 3

_SETTINGS = """[server]
host = "0.0.0.0"
port = 8080
workers = 4
timeout_seconds = 30
log_level = "info"

[database]
url = "postgres://localhost/shop"
pool_size = 10
"""
# A small base model repeats itself when greedy, which flatters a drafter that copies: prose is
# sampled. The seed makes both answers the same all the same.
OPTIONS: dict[str, Options] = {"free prose": {"temperature": 0.8, "seed": 7}}
PROMPTS = {
    "edit a file": f"Original file:\n{_SETTINGS}\nThe same file with port = 9090:\n[server]\n",
    "code": "def add(a, b):\n    return a + b\n\ndef subtract(a, b):\n    return a - b\n\n"
    "def multiply(a, b):\n",
    "JSON lines": '{"id": 1, "city": "Paris", "country": "France"}\n'
    '{"id": 2, "city": "Rome", "country": "Italy"}\n{"id": 3,',
    "free prose": "It was late in the evening when the old sailor finally began to tell his story.",
}


@dataclass(frozen=True)
class Comparison:
    """One prompt, answered by plain decoding and by speculation."""

    plain: list[Completion]
    speculative: list[Completion]

    @property
    def plain_speed(self) -> float:
        """Tokens/s, median of the repeats."""
        return statistics.median(c.tokens_per_second for c in self.plain)

    @property
    def speculative_speed(self) -> float:
        """Tokens/s, median of the repeats."""
        return statistics.median(c.tokens_per_second for c in self.speculative)

    @property
    def same(self) -> str:
        """Whether both gave the same text, and if not, after how many characters they part."""
        plain, speculative = self.plain[0].text, self.speculative[0].text
        if plain == speculative:
            return "yes"
        pairs = enumerate(zip(plain, speculative, strict=False))
        length = min(len(plain), len(speculative))
        return f"no, from character {next((i for i, (a, b) in pairs if a != b), length)}"


def main() -> int:
    """Runs the demo; returns the exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    server = TritonServer(MODEL_REPOSITORY, extra_args=[ONE_BY_ONE])
    try:
        start(server)
        client = Client(server.grpc_url)
        client.generate("Warm up.", max_tokens=16, temperature=0.0)
        comparisons = {name: compare(client, name, prompt) for name, prompt in PROMPTS.items()}
        print_table(comparisons)
        print(conditions(server.log_file))
        chat(client.for_model(CHAT_MODEL))
    except (ServerError, TandemClientError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    finally:
        server.stop()
    return 0


def start(server: TritonServer) -> None:
    """Starts the server and shows that it loads."""
    on_terminal = sys.stdout.isatty()

    def show(waited: float) -> None:
        if on_terminal:
            print(f"\rStarting Triton ... {waited:.0f} s", end="", flush=True)

    if not on_terminal:
        print("Starting Triton ...", flush=True)
    server.start()
    server.wait_ready(on_poll=show)
    print(f"\rTriton is ready at {server.grpc_url}.", flush=True)


def compare(client: Client, name: str, prompt: str) -> Comparison:
    """Answers a prompt in both ways, in turns; the first speculative answer is shown."""
    print(f"\n--- {name}\n{prompt}", end="", flush=True)
    runs: dict[bool, list[Completion]] = {False: [], True: []}
    for repeat in range(REPEATS):
        for speculative in (True, False):
            options: Options = {"max_tokens": MAX_TOKENS, "temperature": 0.0}
            options |= OPTIONS.get(name, {})
            if not speculative:
                options["drafter"] = "none"
            show = printer(sys.stdout) if speculative and repeat == 0 else ignore
            runs[speculative].append(follow(client, prompt, options, show))
    print(flush=True)
    return Comparison(runs[False], runs[True])


def chat(client: Client) -> None:
    """One turn with the model that has a chat template."""
    print(f"\n--- chat, with {client.model}\n> {QUESTION}")
    messages = [{"role": "user", "content": QUESTION}]
    options: Options = {"max_tokens": MAX_TOKENS, "temperature": 0.0}
    completion = follow(client, messages, options, printer(sys.stdout))
    print(f"\n{summary(completion)}")


def print_table(comparisons: dict[str, Comparison]) -> None:
    """Prints one line for each prompt."""
    print(
        f"\n{'prompt':12} {'plain':>10} {'speculative':>12} {'ratio':>6} {'acceptance':>11} "
        f"{'mean length':>12}  same text"
    )
    for name, result in comparisons.items():
        rate = result.speculative[0].acceptance_rate
        print(
            f"{name:12} {result.plain_speed:6.1f} t/s {result.speculative_speed:8.1f} t/s "
            f"{result.speculative_speed / result.plain_speed:6.2f} "
            f"{'-' if rate is None else format(rate, '.0%'):>11} "
            f"{result.speculative[0].mean_acceptance_length:12.2f}  {result.same}"
        )


def conditions(log_file: Path) -> str:
    """What the figures hold for."""
    settings = json.loads((MODEL_REPOSITORY / "tandem/1/model.json").read_text())
    log, name = log_file.read_text(errors="replace"), Path(settings["verifier"]).name
    loaded = re.search(rf"loaded \S*{re.escape(name)} in (\S+) on (\w+)", log)
    dtype, device = loaded.groups() if loaded else ("?", "?")
    return (
        f"{name}, {dtype} on {device}, "
        f"{len(os.sched_getaffinity(0))} cores, drafter {settings['default_drafter']}, one request "
        f"at a time, {MAX_TOKENS} tokens, medians of {REPEATS}; greedy, but free prose at "
        "temperature 0.8.\nacceptance: share of the draft tokens that the verifier accepted; mean "
        "length: tokens of a round that had drafts."
    )
