"""Stage 1: text from the verifier itself, which is what a drafter will have to guess."""

from __future__ import annotations

import random
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from tandem import Engine, EngineConfig, SamplingParams
from tandem.errors import ConfigError
from tandem.models.checkpoint import load_tokenizer
from tandem.requests.sequence import FinishReason, Sequence
from tandem_train.corpus import Corpus, TrainingText
from tandem_train.openings import opening

# Served text is greedy or sampled; each text begins with sampled tokens, whatever follows.
TEMPERATURES = (0.0, 0.0, 0.0, 0.7, 1.0)
_MIN_BEGINNING, _MAX_BEGINNING = 8, 48
_BATCH_SIZE = 64
# Out of the way of the verifier's own texts, of which more may be asked for later.
_FIRST_TEXT_INDEX = 1_000_000


@dataclass(frozen=True)
class Recipe:
    """How a text comes about: an opening, a sampled beginning, and what follows on that.

    The sampled beginning leads texts with the same opening to different places; greedy text that
    follows the openings themselves would be about few things.
    """

    index: int
    opening: list[int]
    beginning: SamplingParams
    rest: SamplingParams


def generate(
    verifier: str,
    corpus: Corpus,
    *,
    num_sequences: int,
    sequence_length: int,
    seed: int,
    prompts: Items[str] = (),
    dtype: str = "auto",
    device: str = "auto",
) -> None:
    """Writes the sequences that are missing from the corpus, up to `num_sequences`.

    Sequence `index` depends on the seed and its index alone, so it doesn't matter how often the
    work was interrupted.

    Args:
        sequence_length: tokens of a sequence at most, opening included.
        prompts: openings in place of the built-in ones, taken in turn.

    Raises:
        ConfigError: `sequence_length` leaves no room for a beginning and more.
    """
    if sequence_length < _MIN_BEGINNING:
        raise ConfigError(
            f"--sequence-length {sequence_length} is too short; {_MIN_BEGINNING} is the least"
        )
    done = {text.index for text in corpus}
    missing = [index for index in range(num_sequences) if index not in done]
    if not missing:
        return
    engine = Engine(
        EngineConfig(
            verifier=verifier,
            dtype=dtype,
            device=device,
            max_num_seqs=_BATCH_SIZE,
            max_model_len=sequence_length,
            max_num_batched_tokens=max(512, 2 * _BATCH_SIZE),
            kv_cache_tokens=_BATCH_SIZE * (sequence_length + 16),
        )
    )
    recipes = (_recipe(engine, index, seed, prompts, sequence_length) for index in missing)
    with tqdm(total=num_sequences, initial=len(done), unit=" sequences", desc="generate") as bar:
        for text in _written(engine, recipes):
            corpus.append(text)
            num_tokens = engine.stats.num_generation_tokens
            bar.set_postfix_str(f"{num_tokens / bar.format_dict['elapsed']:.0f} tokens/s")
            bar.update()


def _written(engine: Engine, recipes: Iterator[Recipe]) -> Iterator[TrainingText]:
    """Follows the recipes in one continuous batch; yields texts as they are done."""
    live: dict[Sequence, Recipe] = {}

    def run(recipe: Recipe, token_ids: list[int], params: SamplingParams) -> None:
        sequence = engine.make_sequence(token_ids, params)
        engine.add(sequence)
        live[sequence] = recipe

    while True:
        for recipe in islice(recipes, _BATCH_SIZE - len(live)):
            run(recipe, recipe.opening, recipe.beginning)
        if not live:
            return
        for delta in engine.step():
            if delta.finish_reason is None:
                continue
            sequence = delta.sequence
            recipe = live.pop(sequence)
            if sequence.error is not None:
                raise sequence.error
            has_begun = sequence.params is recipe.beginning
            if has_begun and sequence.finish_reason is FinishReason.LENGTH:
                run(recipe, sequence.token_ids, recipe.rest)
            else:
                yield TrainingText(
                    recipe.index,
                    list(sequence.token_ids),
                    len(recipe.opening),
                    recipe.rest.temperature,
                )


def _recipe(
    engine: Engine, index: int, seed: int, prompts: Items[str], sequence_length: int
) -> Recipe:
    rng = random.Random(f"{seed}/{index}")
    text = prompts[index % len(prompts)] if prompts else opening(rng)
    ids = _token_ids(engine, text)[: sequence_length // 2]
    room = sequence_length - len(ids)
    num_begun = min(rng.randint(_MIN_BEGINNING, _MAX_BEGINNING), room // 2)
    return Recipe(
        index,
        ids,
        SamplingParams(max_tokens=num_begun, temperature=1.0, seed=rng.getrandbits(64)),
        SamplingParams(
            max_tokens=room - num_begun,
            temperature=rng.choice(TEMPERATURES),
            seed=rng.getrandbits(64),
        ),
    )


def _token_ids(engine: Engine, text: str) -> list[int]:
    assert engine.tokenizer is not None
    ids: list[int] = list(engine.tokenizer(text)["input_ids"])
    return ids or [min(engine.eos_token_ids, default=0)]


def add_texts(verifier: str, corpus: Corpus, paths: Items[Path], sequence_length: int) -> None:
    """Adds text files, cut into sequences; what is in the corpus already isn't added again.

    Raises:
        ConfigError: the verifier has no tokenizer.
    """
    if not paths:
        return
    tokenizer = load_tokenizer(verifier)
    if tokenizer is None:
        raise ConfigError(f"{verifier} has no tokenizer, so text files can't be used")
    known = list(corpus)
    seen = {tuple(text.token_ids) for text in known}
    index = max((text.index + 1 for text in known), default=0)
    index = max(index, _FIRST_TEXT_INDEX)
    for path in tqdm(paths, desc="text files", unit=" files"):
        ids = list(tokenizer(path.read_text(encoding="utf-8"))["input_ids"])
        for start in range(0, len(ids) - 1, sequence_length):
            part = ids[start : start + sequence_length]
            if tuple(part) not in seen:
                corpus.append(TrainingText(index, part, len(part), None))
                index += 1
