"""What a round decides on the device, against the same in plain loops."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from tandem.lookahead.estimates import NUM_BINS
from tandem.requests.params import SamplingParams
from tandem.requests.sequence import GIVEN_BACK, BlockTable, Sequence
from tandem.rounds.layout import Batch, accepted, choose, lay_out
from tandem.rounds.programs import buckets
from tandem.rounds.slots import Slots

BLOCK_SIZE, MAX_DRAFTS, NUM_SLOTS = 4, 3, 5


@given(st.data())
def test_the_most_valuable_drafts_are_chosen(data: st.DataObject) -> None:
    """As many as may be; none whose forerunners are left out."""
    count = data.draw(st.integers(1, 5), label="places")
    num_rows = data.draw(st.integers(0, 12), label="rows")
    rng = random.Random(data.draw(st.integers(0, 999), label="seed"))
    limits = [rng.randint(0, MAX_DRAFTS) for _ in range(count)]
    sure = [[rng.random() for _ in range(MAX_DRAFTS)] for _ in range(count)]
    chances = [[rng.choice([0.01, 0.5, 0.9, 0.99]) for _ in range(NUM_BINS)] for _ in range(count)]
    told = [rng.random() < 0.5 for _ in range(count)]
    gains, values = [], []
    for place in range(count):
        own = [1.0, 0.5, 0.5][:MAX_DRAFTS] if told[place] else [-1.0] * MAX_DRAFTS
        gains.append(own)
        reached, found = 1.0, []
        for depth in range(MAX_DRAFTS):
            reached *= chances[place][min(NUM_BINS - 1, int(sure[place][depth] * NUM_BINS))]
            found.append(own[depth] if told[place] else reached)
        values.append(found)
    kept = choose(
        torch.tensor(gains, dtype=torch.float64),
        torch.tensor(chances, dtype=torch.float64),
        torch.tensor(sure, dtype=torch.float64),
        torch.tensor(limits),
        torch.tensor([num_rows]),
    ).tolist()
    assert sum(kept) == min(num_rows, sum(limits))
    assert all(0 <= number <= limit for number, limit in zip(kept, limits, strict=True))
    taken = [values[p][d] for p in range(count) for d in range(kept[p])]
    left = [values[p][d] for p in range(count) for d in range(kept[p], limits[p])]
    assert min(taken, default=2.0) >= max(left, default=0.0) - 1e-12


@given(st.data())
def test_every_token_lies_where_a_loop_would_put_it(data: st.DataObject) -> None:
    """Chunks of prompts, sequences with and without drafts, padding behind them."""
    rng = random.Random(data.draw(st.integers(0, 9999), label="seed"))
    count = data.draw(st.integers(1, NUM_SLOTS), label="sequences")
    slots = rng.sample(range(NUM_SLOTS), count)
    num_known = [rng.choice([1, 1, 6]) for _ in range(count)]
    yields = [int(known == 1 or rng.random() < 0.5) for known in num_known]
    num_drafts = [rng.randint(0, MAX_DRAFTS) if known == 1 else 0 for known in num_known]
    start = [rng.randint(0, 9) for _ in range(count)]
    known = [[rng.randint(1, 99) for _ in range(number)] for number in num_known]
    drafts = [[rng.randint(100, 199) for _ in range(MAX_DRAFTS)] for _ in range(count)]
    tables = [[rng.sample(range(50), 6) for _ in range(NUM_SLOTS + 1)] for _ in range(2)]
    total, sampled = sum(num_known) + sum(num_drafts), sum(yields) + sum(num_drafts)
    num_rows = total + data.draw(st.integers(0, 4), label="padding")
    num_places = data.draw(st.integers(count, NUM_SLOTS), label="places")
    more = num_places - count

    flat = [token for each in known for token in each]
    batch = Batch(
        slot=torch.tensor(slots + [NUM_SLOTS] * more),
        start=torch.tensor(start + [0] * more),
        num_known=torch.tensor(num_known + [0] * more),
        yields=torch.tensor(yields + [0] * more),
        known=torch.tensor(flat + [0] * (40 - len(flat))),
    )
    layout = lay_out(
        batch,
        torch.tensor(drafts + [[0] * MAX_DRAFTS] * more),
        torch.tensor(num_drafts + [0] * more),
        torch.tensor(tables, dtype=torch.int32),
        BLOCK_SIZE,
        [900, 901],
        num_rows,
        sampled + 2,
    )

    row, behind = 0, 0
    for place in range(count):
        tokens = known[place] + drafts[place][: num_drafts[place]]
        stop = row + len(tokens)
        positions = list(range(start[place], start[place] + len(tokens)))
        assert layout.token_ids[0, row:stop].tolist() == tokens
        assert layout.positions[0, row:stop].tolist() == positions
        for group in range(2):
            table = tables[group][slots[place]]
            assert layout.slots[group][row:stop].tolist() == [
                table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions
            ]
            begins = (group * (NUM_SLOTS + 1) + slots[place]) * 6
            span = [row, len(tokens), start[place] + len(tokens), begins]
            assert layout.spans[group][place].tolist() == span
        if yields[place]:
            wanted = list(range(stop - num_drafts[place] - 1, stop))
            own = slice(behind, behind + len(wanted))
            assert layout.first[place] == behind
            assert layout.sampled[own].tolist() == wanted
            assert layout.places[own].tolist() == [place] * len(wanted)
            assert layout.offsets[own].tolist() == list(range(len(wanted)))
            behind += len(wanted)
        row = stop
    assert [group[row:].unique().tolist() for group in layout.slots if num_rows > row] == (
        [[900], [901]] if num_rows > row else []
    )
    assert all(span[1] == 0 for group in layout.spans for span in group[count:].tolist())


@given(st.lists(st.lists(st.integers(0, 1), min_size=3, max_size=3), min_size=1, max_size=4))
def test_drafts_are_accepted_up_to_the_first_that_differs(rows: list[list[int]]) -> None:
    """And no further than there are; a coin decides where there is one."""
    drafts = torch.tensor(rows)
    verified = torch.ones(len(rows), 4, dtype=torch.long)
    for number in range(4):
        num_drafts = torch.full((len(rows),), number)
        found = accepted(verified, drafts, num_drafts, torch.full((len(rows),), -1)).tolist()
        assert found == [next((i for i in range(number) if not row[i]), number) for row in rows]
        found = accepted(verified, drafts, num_drafts, torch.full((len(rows),), 2)).tolist()
        assert found == [min(2, number)] * len(rows)


@given(st.integers(0, 9999))
def test_the_device_knows_all_that_can_be_read(seed: int) -> None:
    """Sequences come, grow, shrink, give blocks back, are evicted and come again."""
    rng = random.Random(seed)
    slots = Slots(2, 2)
    device: dict[tuple[int, int, int], int] = {}
    pool = {number: _sequence(number) for number in range(4)}
    for _ in range(30):
        present = rng.sample(list(pool.values()), rng.randint(1, 2))
        for sequence in present:
            for table in sequence.block_tables:
                _change(table, rng)
        numbers = slots.assign(present)
        assert len({*numbers}) == len(present)
        for group, slot, index, block in slots.changes(present):
            device[group, slot, index] = block
        for sequence, slot in zip(present, numbers, strict=True):
            for group, table in enumerate(sequence.block_tables):
                for index in range(table.start, len(table.blocks)):
                    assert device[group, slot, index] == table.blocks[index]
        assert slots.changes(present) == []


def _sequence(number: int) -> Sequence:
    sequence = Sequence(number, [1], 1, SamplingParams(), 0, "none", 0)
    sequence.block_tables = [BlockTable(), BlockTable()]
    return sequence


def _change(table: BlockTable, rng: random.Random) -> None:
    what = rng.random()
    if what < 0.2:
        table.blocks.clear()
        table.start = 0
    elif what < 0.4:
        del table.blocks[max(table.start, len(table.blocks) - 2) :]
    elif what < 0.6 and len(table.blocks) > table.start:
        table.blocks[table.start] = GIVEN_BACK
        table.start += 1
    table.blocks += [rng.randint(0, 9) for _ in range(rng.randint(0, 3))]


def test_graphs_are_made_for_two_sizes_a_doubling() -> None:
    """Up to the largest, which is one of them."""
    assert buckets(1) == [1]
    assert buckets(20) == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert all(buckets(n)[-1] == n for n in range(1, 70))
