"""What a program has to read, write and multiply at least, counted on tensors without contents."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from tandem_bench.launches import Launches, noted_kernels, storage_of
from tandem_bench.meta_round import Load, MetaRound

_LOOKUPS = ("embedding", "index", "index_select")
KINDS = ("weights", "kv", "parts", "logits")


@dataclass
class Work:
    """Of one program.

    Attributes:
        launches: by operation; one that torch computes by several kernels, such as a sort, is one.
        bytes: of `KINDS`: weights, once for each product that reads them, and rows that are looked
            up; K/V that attention reads; what its parts leave for one another; and logits, where an
            operation reads or writes them. Activations between products are not in it.
        flops: of products.
        by_operation: bytes and flops of those that have any.
    """

    launches: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    flops: int = 0
    by_operation: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def num_launches(self) -> int:
        """Of all operations."""
        return sum(self.launches.values())

    @property
    def num_bytes(self) -> int:
        """Of all kinds."""
        return sum(self.bytes.values())


def work_of(round_: MetaRound, load: Load, context: int) -> dict[str, Work]:
    """The work of each program of a step.

    Args:
        context: tokens of each sequence whose K/V are in the cache before it.
    """
    found = {}
    for name, program in round_.programs(load).items():
        counter = _Counter(round_, load, context)
        noted(program, counter)
        counter.work.launches = dict(counter.counts.most_common())
        found[name] = counter.work
    return found


def launches_of(programs: dict[str, Callable[[], object]]) -> dict[str, dict[str, int]]:
    """What each program launches, by operation, the most frequent first."""
    found = {}
    for name, program in programs.items():
        launches = Launches()
        noted(program, launches)
        found[name] = dict(launches.counts.most_common())
    return found


def noted(program: Callable[[], object], launches: Launches) -> None:
    """Runs a program whose kernels are noted; `torch.inference_mode` would hide copies."""
    with torch.no_grad(), noted_kernels(launches), launches:
        program()


class _Counter(Launches):  # type: ignore[no-untyped-call]
    def __init__(self, round_: MetaRound, load: Load, context: int) -> None:
        super().__init__()
        models = round_.verifier, round_.assistant
        self._weights = {storage_of(p) for model in models for p in model.parameters()}
        self._vocab_size: int = round_.verifier.config.get_text_config().vocab_size
        self._load = load
        self._context = context
        self.work = Work()

    def count_operation(
        self, func: Any, args: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        """Weights, logits and products of an operation of torch."""
        name = func.overloadpacket.__name__
        flops = 0
        weights = [tensor for tensor in inputs if storage_of(tensor) in self._weights]
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            flops = formula(*args, out_val=outputs[0])
            self._add(name, "weights", weights)
            if name == "bmm":  # what was looked up is multiplied
                self._add(name, "weights", inputs)
        elif weights and name in _LOOKUPS:
            self._add(name, "weights", outputs * 2)
        # Of what is gathered a few numbers are read.
        touched = [] if name == "gather" else [*inputs, *outputs]
        rows = [t for t in touched if t.shape[-1:] == (self._vocab_size,)]
        self._add(name, "logits", [t for t in rows if storage_of(t) not in self._weights])
        self._add_flops(name, flops)

    def count_kernel(self, name: str, arguments: dict[str, Any]) -> None:
        """K/V, parts and products of attention; logits that sampling reads."""
        if name in ("attend_parts", "join_parts"):
            self._count_parts(name, arguments)
        if name == "attend_parts":
            window, causal = arguments["WINDOW"], arguments["CAUSAL"]
            self._count_attention(arguments["query"], arguments["keys"], window, causal)
        # In between a row is searched, for what is not known here.
        if name in ("find_maxima", "find_winners"):
            self._add(name, "logits", [arguments["logits"]])

    def _count_parts(self, name: str, arguments: dict[str, Any]) -> None:
        """Those that have a split of what the last query sees."""
        parts, window = arguments["parts"], arguments["WINDOW"]
        each = parts.shape[1] // self._load.num_sequences
        length = self._context + (each if arguments["CAUSAL"] else 0)
        first = max(0, length - window) if window else 0
        num_splits = -(-length // arguments["SPLIT"]) - first // arguments["SPLIT"]
        used = min(len(parts), num_splits)
        self._add(name, "parts", [arguments["states"][:used], parts[:used]])

    def _count_attention(self, query: Tensor, keys: Tensor, window: int, causal: bool) -> None:
        _, num_heads, num_tokens, head_dim = query.shape
        each = num_tokens // self._load.num_sequences
        length = self._context + (each if causal else 0)
        seen = min(length, window) if window else length
        # Each query's window begins one token further on.
        read = min(length, seen + each - 1)
        size = 2 * read * keys.shape[1] * head_dim * keys.element_size()
        self._add_bytes("attend_parts", "kv", self._load.num_sequences * size)
        self._add_flops("attend_parts", 4 * num_tokens * num_heads * head_dim * seen)

    def _add(self, name: str, kind: str, tensors: Iterable[Tensor]) -> None:
        self._add_bytes(name, kind, sum(t.numel() * t.element_size() for t in tensors))

    def _add_bytes(self, name: str, kind: str, count: int) -> None:
        self.work.bytes[kind] += count
        self._add_to(name, count, 0)

    def _add_flops(self, name: str, count: int) -> None:
        self.work.flops += count
        self._add_to(name, 0, count)

    def _add_to(self, name: str, num_bytes: int, flops: int) -> None:
        if num_bytes or flops:
            before = self.work.by_operation.get(name, (0, 0))
            self.work.by_operation[name] = before[0] + num_bytes, before[1] + flops
