"""A client over HTTP that is a process of its own, for tests that kill it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

_PROGRAM = """
import sys
import urllib.request

url, body, *headers = sys.argv[1:]
names = dict(header.split(": ") for header in headers)
with urllib.request.urlopen(urllib.request.Request(url, body.encode(), names)) as answer:
    for line in answer:
        print(line.decode(), end="", flush=True)
"""


def post_from_a_process(url: str, body: dict[str, Any], *headers: str) -> subprocess.Popen[bytes]:
    """Posts the body, and prints what is answered line by line."""
    command = [sys.executable, "-c", _PROGRAM, url, json.dumps(body)]
    command += ["Content-Type: application/json", *headers]
    return subprocess.Popen(command, stdout=subprocess.PIPE)
