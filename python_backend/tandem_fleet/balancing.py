"""Rules by which a balancer picks the pod for a request."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import count

from tandem_fleet.pod import Pod, Request

Balancer = Callable[[Sequence[Pod], int, Request], Pod]


def balancer(name: str, rng: random.Random) -> Balancer:
    """A rule by its name; `least` and `prefix` are those of deploy/base/envoy/envoy.yaml.

    A rule takes the pods, the number of requests in them together, and the new request.
    """
    turns = count()

    def least(pods: Sequence[Pod], _: int, __: Request) -> Pod:
        drawn = pods if len(pods) <= 16 else rng.choices(pods, k=16)
        return min(drawn, key=lambda pod: (pod.num_requests, rng.random()))

    def prefix(pods: Sequence[Pod], total: int, request: Request) -> Pod:
        """A ring with bounded loads (Mirrokni and others, 2018): at most 1.25 times the mean."""
        bound = math.ceil(1.25 * (total + 1) / len(pods))
        place = random.Random(request.conversation).randrange(len(pods))
        for offset in range(len(pods)):
            pod = pods[(place + offset) % len(pods)]
            if pod.num_requests < bound:
                return pod
        return pods[place]

    rules: dict[str, Balancer] = {
        "random": lambda pods, _, __: rng.choice(pods),
        "round-robin": lambda pods, _, __: pods[next(turns) % len(pods)],
        "least": least,
        "prefix": prefix,
    }
    return rules[name]
