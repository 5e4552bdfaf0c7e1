"""Stage 2: an assistant learns the verifier's distribution, several steps ahead."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tandem.drafters.assistant import Assistant
from tandem.errors import ConfigError
from tandem.models.checkpoint import load_model
from tandem.models.loading import resolve
from tandem_train.corpus import TrainingText
from tandem_train.features import DENSE_ATTENTION, Features, FeatureStore
from tandem_train.plot import plot
from tandem_train.start import (
    default_source_layers,
    draft_vocabulary,
    fit_pre_projection,
    new_assistant,
    trained_assistant,
)
from tandem_train.unroll import StepResult, acceptance, unroll

_SECONDS_BETWEEN_CHECKPOINTS = 240
_VALIDATION_TEXTS = 16
_FIT_TEXTS = 200


@dataclass(frozen=True)
class TrainingConfig:
    """How an assistant is trained.

    Attributes:
        start_from: a trained assistant to train further, with its source layers and vocabulary.
        source_layers: the verifier's layers that are copied and whose K/V are read; none stands
            for `default_source_layers`.
        draft_vocab_size: tokens that can be guessed, at most.
        num_steps: guesses ahead that are trained.
        step_decay: weight of each step's loss against the one before.
        epochs: passes over the texts.
        batch_size: texts in one update.
        learning_rate: at its highest; cosine down to a tenth.
        seed: of the order of the texts.
    """

    start_from: str | None = None
    source_layers: list[int] = field(default_factory=list)
    draft_vocab_size: int = 8192
    num_steps: int = 3
    step_decay: float = 0.8
    epochs: int = 4
    batch_size: int = 8
    learning_rate: float = 5e-4
    warmup: float = 0.03
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0


def train(
    verifier_path: str,
    texts: Items[TrainingText],
    config: TrainingConfig,
    directory: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
) -> None:
    """Trains an assistant on the texts and saves it in `directory/drafter`.

    Raises:
        ConfigError: there are too few texts, or a checkpoint of other settings is in the way.
        DrafterMismatchError: the assistant to start from was trained for another verifier.
    """
    train_texts = [text for text in texts if not text.is_held_out]
    if len(train_texts) < config.batch_size:
        raise ConfigError(
            f"{len(train_texts)} texts to train on in {directory / 'corpus'}, and one update takes "
            f"{config.batch_size}: generate more, or lower --batch-size"
        )
    verifier = load_model(verifier_path, *resolve(dtype, device))
    verifier.set_attn_implementation(DENSE_ATTENTION)
    if config.start_from is not None:
        assistant = trained_assistant(config.start_from, verifier)
    else:
        vocabulary = draft_vocabulary(train_texts, config.draft_vocab_size)
        layers = config.source_layers or default_source_layers(verifier)
        assistant = new_assistant(verifier, layers, vocabulary)
    source_layers = assistant.config.source_layers
    vocab_size = assistant.config.draft_vocab_size
    config = replace(config, source_layers=source_layers, draft_vocab_size=vocab_size)
    length = max(len(text.token_ids) for text in texts)
    assistant.config.trained_length = max(length, assistant.config.trained_length or 0)
    store = FeatureStore(verifier, source_layers, length)
    mixed_precision = verifier.dtype == torch.bfloat16
    trainer = Trainer(assistant, store, texts, config, directory, mixed_precision=mixed_precision)
    if not trainer.resume() and config.start_from is None:
        batches = store.token_batches(train_texts[:_FIT_TEXTS])
        fit_pre_projection(assistant, verifier, batches)
    trainer.run()
    save(assistant, directory / "drafter")


def save(assistant: Assistant, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes the checkpoint that the `mtp` drafter loads; the head is no part of it."""
    weights = {
        name: weight.to(dtype) if weight.is_floating_point() else weight
        for name, weight in assistant.state_dict().items()
        if not name.startswith("head.")
    }
    assistant.config.dtype = dtype
    assistant.save_pretrained(directory, state_dict=weights)
    (directory / "model.safetensors").chmod(0o644)


@dataclass
class Progress:
    """Where training stands; saved with every checkpoint."""

    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Trains one assistant; goes on where a checkpoint in its directory ends."""

    def __init__(
        self,
        assistant: Assistant,
        store: FeatureStore,
        texts: Items[TrainingText],
        config: TrainingConfig,
        directory: Path,
        *,
        mixed_precision: bool = False,
    ) -> None:
        self._mixed_precision = mixed_precision
        self.assistant = assistant
        self.config = config
        self.progress = Progress()
        self._store = store
        self._train = [text for text in texts if not text.is_held_out]
        held_out = [text for text in texts if text.is_held_out]
        self._validation = [t for t in held_out if t.temperature == 0.0][:_VALIDATION_TEXTS]
        self._validation = self._validation or held_out[:_VALIDATION_TEXTS]
        self._directory = directory
        self._checkpoint = directory / "checkpoint.pt"
        self.num_updates = config.epochs * (len(self._train) // config.batch_size)
        weights = [p for p in assistant.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            weights, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )
        self._weights = weights
        self._settings = {**asdict(config), "num_texts": len(self._train)}

    def resume(self) -> bool:
        """Loads the checkpoint if there is one."""
        if not self._checkpoint.exists():
            return False
        saved = torch.load(self._checkpoint, weights_only=True)
        if saved["settings"] != self._settings:
            raise ConfigError(
                f"{self._checkpoint} was made with other settings or texts: {saved['settings']}, "
                f"now {self._settings}; delete it to start anew"
            )
        self.assistant.load_state_dict(saved["assistant"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self.progress = Progress(**saved["progress"])
        # An update that was interrupted half-way is done again.
        self.progress.history = [
            entry
            for entry in self.progress.history
            if "loss" not in entry or entry["step"] < self.progress.step
        ]
        return True

    def run(self) -> None:
        """Trains to the end, with a checkpoint now and then, and one when interrupted."""
        last_saved = started = time.monotonic()
        already = self.progress.seconds
        bar = tqdm(
            total=self.num_updates, initial=self.progress.step, unit=" updates", desc="train"
        )
        if not self.progress.history:
            self._validate()
            self._save()
        try:
            with bar:
                while self.progress.step < self.num_updates:
                    result = self._update(self._batch(self.progress.step))
                    self.progress.step += 1
                    self.progress.seconds = already + time.monotonic() - started
                    bar.set_postfix_str(result)
                    bar.update()
                    if time.monotonic() - last_saved > _SECONDS_BETWEEN_CHECKPOINTS:
                        self._validate()
                        self._save()
                        last_saved = time.monotonic()
            self._validate()
        finally:
            # Also on Ctrl-C; a kill loses what came after the last checkpoint.
            self._save()

    def _batch(self, step: int) -> list[TrainingText]:
        """The texts of an update, in an order that depends on seed and epoch alone."""
        size = self.config.batch_size
        epoch, number = divmod(step, len(self._train) // size)
        order = list(range(len(self._train)))
        random.Random(f"{self.config.seed}/{epoch}").shuffle(order)
        return [self._train[index] for index in order[number * size : (number + 1) * size]]

    def _update(self, texts: Items[TrainingText]) -> str:
        rate = self._learning_rate()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        features = self._store.batch(texts)
        losses, total, weight_sum = [], torch.zeros((), device=features.hidden.device), 0.0
        for step, result in enumerate(self._unroll(features)):
            weight = self.config.step_decay**step
            total = total + weight * result.loss
            weight_sum += weight
            losses.append(result.loss.item())
        self._optimizer.zero_grad()
        (total / weight_sum).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._weights, self.config.max_grad_norm)
        self._optimizer.step()
        self.progress.num_tokens += sum(len(text.token_ids) for text in texts)
        self._log({"loss": losses, "learning_rate": rate})
        return "loss " + " ".join(f"{loss:.2f}" for loss in losses)

    def _unroll(self, features: Features) -> Iterator[StepResult]:
        """In bfloat16 where the verifier runs in it; the weights stay float32."""
        device = features.hidden.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._mixed_precision):
            yield from unroll(self.assistant, features, self.config.num_steps)

    def _learning_rate(self) -> float:
        warmup = max(1, round(self.config.warmup * self.num_updates))
        step = self.progress.step
        if step < warmup:
            return self.config.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.num_updates - warmup)
        return self.config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    def _validate(self) -> None:
        self.assistant.train(False)
        shares = acceptance(self.assistant, self._store, self._validation, self.config.num_steps)
        self.assistant.train()
        self._log({"acceptance": shares})
        tqdm.write(
            f"update {self.progress.step}: held-out acceptance by position "
            + " ".join(f"{share:.3f}" for share in shares)
        )

    def _log(self, values: dict[str, Any]) -> None:
        self.progress.history.append(
            {"step": self.progress.step, "seconds": round(self.progress.seconds, 1), **values}
        )

    def _save(self) -> None:
        """Writes checkpoint, log and plot; the checkpoint is whole or absent."""
        self._directory.mkdir(parents=True, exist_ok=True)
        part = self._checkpoint.with_suffix(".part")
        torch.save(
            {
                "assistant": self.assistant.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "progress": asdict(self.progress),
                "settings": self._settings,
            },
            part,
        )
        part.replace(self._checkpoint)
        lines = "".join(json.dumps(entry) + "\n" for entry in self.progress.history)
        (self._directory / "log.jsonl").write_text(lines, encoding="utf-8")
        plot(self.progress.history, self._directory / "training.png")
