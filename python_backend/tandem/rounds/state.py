"""What rounds keep on the device, in buffers whose addresses never change."""

from __future__ import annotations

import math
from collections.abc import Sequence as Items

import torch

from tandem.config import EngineConfig
from tandem.lookahead.estimates import NUM_BINS
from tandem.models.verifier import Verifier
from tandem.rounds import adjusting
from tandem.rounds.layout import Batch
from tandem.rounds.staging import Staging

# Changes of cells that are sent with a round; more take copies of their own.
MAX_CHANGES = 1024
# How a row is sampled.
SAMPLING = ("seed", "temperature", "top_k", "top_p", "log_min_p")
_FLOATS = frozenset({"temperature", "top_p", "log_min_p", "gains", "chances", "confidences"})


class DeviceState:
    """A line for each place of a batch in what goes and comes, and for each slot in what stays.

    Attributes:
        inputs: what the host sends for a round. Of each place: whose slot it is, what a `Batch`
            needs, the last known token, which model drafts (-1: none) how many tokens at most, how
            many drafts a coin keeps (-1: there is none), how tokens are sampled, drafts of the
            host, and what drafts are worth. Of the round: drafts that are verified at most, known
            tokens, and what changed in the cells.
        results: what it reads.
        adjustments: what requests change in logits, where one does; see `adjusting`.
        tables: block tables, `[num_groups, num_slots + 1, max_blocks]`.
        history: tokens, `[num_slots + 1, max_model_len + 1]`; complete where logits are changed.
        cells: both of them, one behind the other. The last slot and the last cell are nobody's.
        hidden: the verifier's state behind the last token, `[num_slots + 1, hidden_size]`.
        guesses, confidences: of models on the device, `[num_slots, max_drafts]`.
    """

    def __init__(self, verifier: Verifier, config: EngineConfig, max_model_len: int) -> None:
        model, cache = verifier.model, verifier.cache
        device = model.device
        self.num_slots = slots = config.max_num_seqs
        self.max_drafts = depth = max(1, *config.max_lookaheads.values())
        column = (slots,)
        self.inputs = Staging(
            {
                **dict.fromkeys(("slot", "start", "num_known", "yields", "last"), column),
                **dict.fromkeys(("drafter", "limit", "coin", *SAMPLING), column),
                "drafts": (slots, depth),
                "gains": (slots, depth),
                "chances": (slots, NUM_BINS),
                "num_rows": (1,),
                "known": (config.max_num_batched_tokens,),
                "changes": (2, MAX_CHANGES),
            },
            _FLOATS,
            device,
        )
        self.results = Staging(
            {
                "tokens": (slots, depth + 1),
                "num_drafts": column,
                "drafts": (slots, depth),
                "confidences": (slots, depth),
            },
            _FLOATS,
            device,
        )
        self.adjustments = Staging(
            {
                **dict.fromkeys((*adjusting.FLOATS, *adjusting.INTEGERS), column),
                "biased": (slots, adjusting.MAX_BIASED),
                "bias": (slots, adjusting.MAX_BIASED),
                "banned": (slots, adjusting.MAX_BANNED),
            },
            frozenset({*adjusting.FLOATS, "bias"}),
            device,
        )
        shape = (len(cache.windows), slots + 1, -(-max_model_len // cache.block_size) + 1)
        sizes = math.prod(shape), (slots + 1) * (max_model_len + 1)
        self.cells = torch.zeros(sum(sizes) + 1, dtype=torch.int32, device=device)
        tables, history, _ = self.cells.split_with_sizes([*sizes, 1])
        self.tables, self.history = tables.view(shape), history.view(slots + 1, -1)
        width = model.config.get_text_config().hidden_size
        self.hidden = torch.zeros(slots + 1, width, dtype=model.dtype, device=device)
        self.guesses = torch.zeros(slots, depth, dtype=torch.long, device=device)
        self.confidences = torch.zeros(slots, depth, dtype=torch.float64, device=device)

    def batch(self, count: int) -> Batch:
        """The first places of the batch."""
        table = self.inputs.device
        return Batch(
            slot=table["slot"][:count],
            start=table["start"][:count],
            num_known=table["num_known"][:count],
            yields=table["yields"][:count],
            known=table["known"],
        )

    def in_tables(self, changes: Items[tuple[int, int, int, int]]) -> list[tuple[int, int]]:
        """Cells of `Slots.changes`, and what belongs there."""
        _, num_slots, max_blocks = self.tables.shape
        return [
            ((group * num_slots + slot) * max_blocks + index, block)
            for group, slot, index, block in changes
        ]

    def in_history(self, slot: int, token_ids: Items[int]) -> list[tuple[int, int]]:
        """Cells of a sequence's first tokens, and these."""
        first = self.tables.numel() + slot * self.history.shape[1]
        return list(enumerate(token_ids, start=first))

    def write_changes(self, changes: Items[tuple[int, int]]) -> None:
        """Writes at most `MAX_CHANGES` changes of cells to what is sent."""
        table = self.inputs.host["changes"]
        table[0] = len(self.cells) - 1
        if changes:
            table[:, : len(changes)] = list(zip(*changes, strict=True))

    def take_changes(self) -> None:
        """On the device, writes what was sent to its cells."""
        cells, blocks = self.inputs.device["changes"]
        self.cells.index_copy_(0, cells, blocks.int())
