"""Clients that nobody here wrote, run against a server and its gateway as their users run them.

Each has an environment of its own in `.clients`. A proxy before the gateway notes what they send,
for the tests to send it again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import uvicorn
from rich.console import Console

from tandem_bench.recorder import Recorder
from tandem_runtime.paths import ROOT
from tandem_runtime.server import TritonServer
from tandem_runtime.triton import TRITON

PROGRAMS = ROOT / "scripts" / "client_programs"
ENVIRONMENTS = ROOT / ".clients"
PAGE = ROOT / "docs" / "clients.md"
RECORDED = ROOT / "tests" / "server" / "recorded"
MODEL, CHAT_MODEL = "tandem", "tandem_chat"
_REPOSITORY = ROOT / "model_repository"
_VERIFIER = ROOT / ".models" / "gemma-3-270m"
_SECONDS = 600
_MARKS = ("<!-- what was run -->\n", "<!-- end of what was run -->\n")
_STREAMS = "8 chats that are streamed, 2 at a time"
_EXAMPLES = """examples:
  python scripts/clients.py                    all of them; takes half an hour the first time
  python scripts/clients.py openai litellm     these two
  python scripts/clients.py --record openai    and notes what it sends, for the tests
"""


@dataclass(frozen=True)
class Client:
    """One client, and how it is run.

    Attributes:
        packages: what is installed for it; the first one's version is reported.
        command: with places in braces: where the environment is, and the server.
        what: what is run; empty for a program that says so at its end.
        proof: what it prints then, an expression.
    """

    name: str
    packages: tuple[str, ...]
    command: tuple[str, ...]
    what: str = ""
    proof: str = ""


def _program(name: str, *packages: str, file: str = "") -> Client:
    path = PROGRAMS / f"{file or name.replace('-', '_') + '_client'}.py"
    return Client(name, packages or (name,), ("{python}", str(path)))


CLIENTS = (
    _program("openai", file="openai_python"),
    Client("openai for Node", ("openai",), ("node", str(PROGRAMS / "openai_node.mjs"))),
    _program("litellm"),
    _program("langchain-openai", file="langchain_client"),
    _program("llama-index", "llama-index-llms-openai-like"),
    _program("instructor"),
    _program("pydantic-ai", "pydantic-ai-slim[openai]"),
    _program("haystack", "haystack-ai"),
    _program("smolagents", "smolagents[openai,litellm]"),
    _program("dspy"),
    _program("lm-eval", "lm-eval[api,hf]", "torch==2.13.0", "transformers"),
    _program("tritonclient", "tritonclient[all]", file="triton_client"),
    Client(
        "aiperf",
        ("aiperf",),
        (
            *("{bin}/aiperf", "profile", "-m", CHAT_MODEL, "--url", "{gateway}"),
            *("--endpoint-type", "chat", "--streaming", "--request-count", "8"),
            *(
                "--concurrency",
                "2",
                "--tokenizer",
                "{chat_tokenizer}",
                "--isl",
                "32",
                "--osl",
                "16",
            ),
            *("--ui", "none"),
        ),
        _STREAMS,
        r"Request Count[^\d\n]*8",
    ),
    Client(
        "genai-perf",
        ("genai-perf",),
        (
            *("{bin}/genai-perf", "profile", "-m", CHAT_MODEL, "--url", "{gateway}"),
            *("--endpoint-type", "chat", "--streaming", "--request-count", "8"),
            *("--concurrency", "2", "--tokenizer", "{chat_tokenizer}"),
            *("--synthetic-input-tokens-mean", "32", "--output-tokens-mean", "16"),
        ),
        _STREAMS,
        "8/8",
    ),
    Client(
        "guidellm",
        ("guidellm",),
        (
            *("{bin}/guidellm", "run", "--disable-progress", "--output", "kind=console"),
            *("--backend", "kind=openai_http,target={gateway},model=" + CHAT_MODEL),
            *(
                "--profile",
                "kind=concurrent,streams=2",
                "--constraint",
                "kind=max_requests,count=8",
            ),
            *("--tokenizer", "kind=hf_auto,model={chat_tokenizer}"),
            *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"),
        ),
        _STREAMS,
        "Completed Requests",
    ),
    Client(
        "perf_analyzer",
        (),
        (
            *(str(TRITON / "bin" / "perf_analyzer"), "-m", MODEL, "-u", "{grpc}", "-i", "grpc"),
            *("--streaming", "--request-count", "8"),
            *("--input-data", str(PROGRAMS / "perf_analyzer.json")),
        ),
        "8 texts that are streamed over gRPC",
        "Throughput: ",
    ),
    Client(
        "curl",
        (),
        ("bash", str(PROGRAMS / "curl.sh")),
    ),
)


def main() -> int:
    """Runs what is asked for, and writes the page; 1 if something failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [client.name for client in CLIENTS]
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=", ".join(names))
    parser.add_argument("--record", action="store_true", help=f"into {RECORDED.relative_to(ROOT)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.clients) - set(names):
        parser.error(f"no such client: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    chosen = [c for c in CLIENTS if c.name in (arguments.clients or names)]
    console = Console(stderr=True)
    rows: dict[str, list[str]] = {}
    try:
        for client in chosen:
            with console.status(f"{client.name}: installing"):
                _install(client)
        with serving() as (values, recorder):
            for client in chosen:
                recorder.requests.clear()
                with console.status(f"{client.name}: running"):
                    rows[client.name] = _run(client, values)
                console.print(" | ".join(rows[client.name]))
                if arguments.record and recorder.requests:
                    recorder.write(RECORDED / f"{_folder(client)}.json")
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    _write_page(rows)
    return int(any(row[-1].startswith("failed") for row in rows.values()))


def _folder(client: Client) -> str:
    return re.sub(r"\W+", "_", client.name)


def _install(client: Client) -> None:
    """Makes its environment, if it isn't there."""
    folder = ENVIRONMENTS / _folder(client)
    stamp = folder / ".stamp"
    if not client.packages or (stamp.exists() and stamp.read_text() == str(client.packages)):
        return
    if client.command[0] == "node":
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--silent", *client.packages], cwd=folder, check=True)
    else:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(folder / "bin" / "pip"), "install", "--quiet", *client.packages]
        subprocess.run(pip, check=True)
    stamp.write_text(str(client.packages))


def _version(client: Client) -> str:
    if not client.packages:
        command = [client.command[0], "--version"] if client.name != "curl" else ["curl", "-V"]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        found = re.search(r"\d+\.\d+[.\d]*", said)
        return found[0] if found else ""
    folder = ENVIRONMENTS / _folder(client)
    name = client.packages[0].partition("[")[0]
    if client.command[0] == "node":
        package = json.loads((folder / "node_modules" / name / "package.json").read_text())
        return str(package["version"])
    code = f"from importlib.metadata import version; print(version({name!r}))"
    return subprocess.check_output([folder / "bin" / "python", "-c", code], text=True).strip()


def _run(client: Client, values: dict[str, str]) -> list[str]:
    """Its row: name, version, what was run, and whether it did what it should."""
    folder = ENVIRONMENTS / _folder(client)
    names = {"bin": str(folder / "bin"), "python": str(folder / "bin" / "python"), **values}
    command = [part.format(**names) for part in client.command]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([names["bin"], str(TRITON / "bin"), os.environ["PATH"]]),
        "OPENAI_BASE_URL": f"{values['gateway']}/v1",
        "OPENAI_API_KEY": "none",
        "TRITON_HTTP": values["http"],
        "TRITON_GRPC": values["grpc"],
        "MODEL": MODEL,
        "CHAT_MODEL": CHAT_MODEL,
        "VERIFIER": str(_VERIFIER),
        "NODE_PATH": str(folder / "node_modules"),
    }
    environment.pop("PYTHONPATH", None)
    if client.command[0] == "node":
        # Modules look for packages beside themselves alone.
        command[1] = str(folder / "program.mjs")
        (folder / "program.mjs").write_text(Path(client.command[1]).read_text())
    scratch = ENVIRONMENTS / "scratch"
    scratch.mkdir(exist_ok=True)
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        said, is_right = done.stdout + done.stderr, done.returncode == 0
    except subprocess.TimeoutExpired as error:
        said, is_right = (error.stdout or b"").decode() + f"\nnot done after {_SECONDS} s", False
    (scratch / f"{_folder(client)}.log").write_text(said)
    if is_right and re.search(client.proof, said):
        what = client.what or done.stdout.strip().rpartition("\n")[2]
        return [client.name, _version(client), what, "ok"]
    failure = " ".join(said[-300:].replace("|", " ").split())
    return [client.name, _version(client), client.what, f"failed: {failure}"]


# --- the server, and what is sent to it


@contextmanager
def serving() -> Iterator[tuple[dict[str, str], Recorder]]:
    """A server with both models, its gateway, and what notes their requests; where they are."""
    with TemporaryDirectory() as folder, TritonServer(_in_float32(Path(folder))) as server:
        ports = [_free_port() for _ in range(2)]
        command = [sys.executable, "-m", "tandem_gateway.cli", "--url", server.grpc_url]
        gateway = subprocess.Popen([*command, "--port", str(ports[0])])
        recorder = Recorder(f"http://127.0.0.1:{ports[0]}", _SECONDS)
        config = uvicorn.Config(recorder.app, port=ports[1], log_level="warning")
        proxy = uvicorn.Server(config)
        thread = threading.Thread(target=asyncio.run, args=(proxy.serve(),), daemon=True)
        try:
            _wait_for(f"http://127.0.0.1:{ports[0]}/health")
            thread.start()
            _wait_for(f"http://127.0.0.1:{ports[1]}/health")
            yield (
                {
                    "gateway": f"http://127.0.0.1:{ports[1]}",
                    "http": server.http_url.removeprefix("http://"),
                    "grpc": server.grpc_url,
                    "chat_tokenizer": str(ROOT / ".models" / "smollm2-135m-instruct"),
                },
                recorder,
            )
        finally:
            proxy.should_exit = True
            if thread.is_alive():
                thread.join()
            gateway.terminate()
            gateway.wait()


def _in_float32(folder: Path) -> Path:
    """A copy of the repository, with models in the type that likelihoods are compared in."""
    copy = Path(shutil.copytree(_REPOSITORY, folder / "repository"))
    for path in copy.glob("*/1/model.json"):
        config = path.read_text(encoding="utf-8").replace("../../..", str(ROOT))
        path.write_text(json.dumps({**json.loads(config), "dtype": "float32"}), encoding="utf-8")
    return copy


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


def _wait_for(url: str) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"{url} does not answer")


# --- the page


def _write_page(rows: dict[str, list[str]]) -> None:
    """Puts the rows into the page's table; those of clients that weren't run stay."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(_MARKS[0])
    old, after = rest.split(_MARKS[1])
    kept = {line.split(" | ")[0].removeprefix("| "): line for line in old.splitlines()[2:]}
    new = {name: f"| {' | '.join(row)} |" for name, row in rows.items()}
    merged = kept | new
    lines = [merged[client.name] for client in CLIENTS if client.name in merged]
    table = "\n".join(["| client | version | what was run | result |", "|---|---|---|---|", *lines])
    PAGE.write_text(f"{before}{_MARKS[0]}{table}\n{_MARKS[1]}{after}", encoding="utf-8")
