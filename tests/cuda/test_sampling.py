"""Sampling in the Triton language against `tandem.sampling.sample` on a CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tandem import SamplingParams
from tandem.cuda import sampling, sampling_kernels
from tandem.cuda.sampling_kernels import block_exponential, splitmix64
from tandem.cuda.sampling_kernels import gumbel as gumbel_in_kernel
from tandem.sampling import noise
from tandem.sampling.sample import Draw, sample

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
# In the interpreter a failure would be made smaller for minutes.
few = settings(max_examples=12, phases=[Phase.generate])

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.0, 8.0, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 5, 40, 700, 2000]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0]),
)
DRAWS = st.lists(
    st.builds(Draw, PARAMS, st.integers(0, 2**64 - 1), st.integers(0, 2**20)),
    min_size=3,
    max_size=3,
)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks and tiles for each row, at sizes that take no minutes."""
    monkeypatch.setattr(sampling, "_CHUNK_BLOCKS", 2)
    monkeypatch.setattr(sampling, "_TILE", 512)


def columns_of(draws: list[Draw]) -> list[Tensor]:
    """As whoever launches the kernels makes them."""
    params = [draw.params for draw in draws]
    floats = [
        [0.0 if each.is_greedy else each.temperature for each in params],
        [each.top_p for each in params],
        [math.log(each.min_p) if each.min_p else -math.inf for each in params],
    ]
    temperatures, top_p, log_min_p = (
        torch.tensor(column, dtype=torch.float32, device=DEVICE) for column in floats
    )
    integers = [
        [noise.signed(draw.seed) for draw in draws],
        [draw.position for draw in draws],
        [each.top_k for each in params],
    ]
    seeds, positions, top_k = (torch.tensor(column, device=DEVICE) for column in integers)
    return [seeds, positions, temperatures, top_k, top_p, log_min_p]


def choose(logits: Tensor, draws: list[Draw], token_ids: Tensor | None = None) -> Tensor:
    ids = None if token_ids is None else token_ids.to(DEVICE)
    chosen = sampling.choose(logits.to(DEVICE), *columns_of(draws), ids)
    assert chosen.dtype == torch.int64
    return chosen.cpu()


def random_logits(seed: int, *shape: int, spread: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


@triton.jit
def _noise(seeds, positions, tokens, output, largest, num_tokens: tl.constexpr):
    row, place = tl.program_id(0), tl.arange(0, num_tokens)
    seed, position = tl.load(seeds + row), tl.load(positions + row)
    key = splitmix64(seed.to(tl.uint64), position.to(tl.uint64))
    token = tl.load(tokens + row * num_tokens + place)
    smallest, owner = block_exponential(key, token // 256)
    tl.store(output + row * num_tokens + place, gumbel_in_kernel(key, token, smallest, owner))
    tl.store(largest + row * num_tokens + place, (-tl.log(smallest)).to(tl.float32))


def test_noise_has_the_same_bits() -> None:
    """Of 4,096 tokens, owners of their block's largest noise among them, for any seed."""
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (4,), generator=generator)
    seeds[0] = -1
    positions = torch.randint(0, 2**20, (4,), generator=generator)
    tokens = torch.randint(0, 262144, (4, 1024), generator=generator)
    key = noise.splitmix64(seeds, positions)[:, None]
    blocks = torch.arange(100)
    tokens[:, :100] = blocks * 256 + noise.block_gumbel(key, blocks)[1]
    found = torch.empty(2, 4, 1024, device=DEVICE)
    _noise[(4,)](seeds.to(DEVICE), positions.to(DEVICE), tokens.to(DEVICE), *found, 1024)
    assert torch.equal(found[0].cpu(), noise.gumbel(key, tokens))
    assert torch.equal(found[1].cpu(), noise.block_gumbel(key, tokens // 256)[0])


def test_no_noise_is_above_the_bound() -> None:
    """The upper half of these bits is the smallest, which gives the largest noise."""
    largest = noise._gumbel(noise._exponential(torch.tensor([0])) / noise.BLOCK)
    assert 28 < largest < sampling_kernels._MAX_NOISE.value


@few
@pytest.mark.parametrize("vocab_size", [1, 300, 2500])
@given(
    draws=DRAWS, seed=st.integers(0, 999), spread=st.sampled_from([0.01, 1.0, 6.0]), dtype=DTYPES
)
def test_the_tokens_are_the_cpus(
    vocab_size: int, draws: list[Draw], seed: int, spread: float, dtype: torch.dtype
) -> None:
    logits = random_logits(seed, 3, vocab_size, spread=spread).to(dtype)
    assert choose(logits, draws).tolist() == sample(logits, draws).tolist()


@few
@pytest.mark.parametrize(
    "values",
    [[0.0, -0.0, -0.5], [1 - n * 2**-24 for n in range(50)], [2.0**30, 1.0]],
    ids=["both zeros", "neighbours", "too large for noise"],
)
@given(draws=DRAWS, seed=st.integers(0, 999))
def test_ties_are_treated_alike(values: list[float], draws: list[Draw], seed: int) -> None:
    """All that tie with the last of top-k or top-p stay; of equals the first is chosen."""
    places = torch.randint(len(values), (3, 1300), generator=torch.Generator().manual_seed(seed))
    logits = torch.tensor(values)[places]
    assert choose(logits, draws).tolist() == sample(logits, draws).tolist()


@few
@given(draws=DRAWS, seed=st.integers(0, 999), num_allowed=st.sampled_from([1, 3, 30, 1000]))
def test_banned_tokens_are_never_chosen(draws: list[Draw], seed: int, num_allowed: int) -> None:
    """Fewer allowed than top-k asks for, and blocks and chunks without any."""
    logits = torch.full((3, 2500), -math.inf)
    allowed = torch.randperm(2500, generator=torch.Generator().manual_seed(seed))[:num_allowed]
    logits[:, allowed] = random_logits(seed, 3, num_allowed)
    found = choose(logits, draws)
    assert found.tolist() == sample(logits, draws).tolist()
    assert logits[torch.arange(3), found].isfinite().all()


@few
@pytest.mark.parametrize("is_shared", [False, True], ids=["each its own", "one map for all"])
@given(draws=DRAWS, seed=st.integers(0, 999), dtype=DTYPES)
def test_candidates_have_the_noise_of_their_token(
    is_shared: bool, draws: list[Draw], seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randperm(262144, generator=generator)[:1300] for _ in draws]
    ids = torch.stack(maps[:1] * 3 if is_shared else maps)
    logits = random_logits(seed, 3, 1300).to(dtype)
    found = choose(logits, draws, ids[0] if is_shared else ids)
    assert ids[torch.arange(3), found].tolist() == sample(logits, draws, ids).tolist()


def sampled(num_rows: int, **params: Any) -> list[Draw]:
    return [Draw(SamplingParams(**params), seed=row, position=3) for row in range(num_rows)]


@pytest.mark.parametrize("params", [{}, {"top_k": 9}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.8}])
def test_rows_that_are_not_finite_get_none(params: dict[str, Any]) -> None:
    logits = random_logits(0, 6, 1300)
    draws = [*sampled(4, **params), *sampled(2, temperature=0.0)]
    expected = sample(logits, draws).tolist()
    logits[1] = -math.inf
    logits[2, 1299] = math.nan
    logits[3, 17] = math.inf
    logits[5, 0] = math.nan
    assert choose(logits, draws).tolist() == [expected[0], -1, -1, -1, expected[4], -1]


def test_each_is_counted_once() -> None:
    """Where the search looks at numbers that are there: neighbours, each some 50 times."""
    generator = torch.Generator().manual_seed(0)
    logits = 1 - torch.randint(10, (20, 500), generator=generator) * 2.0**-24
    draws = [sampled(20, top_k=60 + 20 * row)[row] for row in range(20)]
    assert choose(logits, draws).tolist() == sample(logits, draws).tolist()


def test_rows_may_lie_apart() -> None:
    """As the logits of some of a pass's rows do."""
    logits = random_logits(1, 8, 600)
    draws = sampled(4, top_k=30)
    rows = logits[::2, 100:450]
    assert choose(rows, draws).tolist() == sample(rows.contiguous(), draws).tolist()


def test_a_row_alone_gets_the_same() -> None:
    logits = random_logits(2, 4, 2500)
    draws = sampled(4, top_p=0.9)
    alone = [choose(logits[row : row + 1], draws[row : row + 1]).item() for row in range(4)]
    assert choose(logits, draws).tolist() == alone


class _Recorded(TorchDispatchMode):
    """What torch would do, and which kernels would be launched; none is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.operations: set[str] = set()
        self.launches: list[tuple[str, tuple[int, ...]]] = []
        for name in ("find_maxima", "find_bounds", "find_winners", "join_winners"):
            monkeypatch.setattr(sampling, name, _Launcher(name, self.launches))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class _Launcher:
    def __init__(self, name: str, launches: list[tuple[str, tuple[int, ...]]]) -> None:
        self._name = name
        self._launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self._launches.append((self._name, grid))
        return lambda *_, **__: None


def test_it_could_be_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but memory is asked of torch, and four launches know the shapes alone."""
    logits, columns = random_logits(0, 3, 262144), columns_of(sampled(3, top_k=4, top_p=0.5))
    with _Recorded(monkeypatch) as recorded:
        sampling.choose(logits, *columns)
    assert recorded.operations == {"new_empty"}
    assert recorded.launches == [
        ("find_maxima", (512, 3)),
        ("find_bounds", (3,)),
        ("find_winners", (512, 3)),
        ("join_winners", (3,)),
    ]
