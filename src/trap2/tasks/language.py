"""Tasks of a language model: what follows a prompt, by likelihood or by generation.

A row is a prompt and a completion; plain text is a completion of nothing. Where neither side of the
seam between them is white space, a space is put in. A completion of a prompt ends with the
tokenizer's end token, which is a target like the others. Too many tokens lose their beginning
where there is a prompt, their end where there is none.

Symbols: N rows, T tokens, V vocabulary, C options.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trap2.errors import UserError
from trap2.tasks.classes import most_frequent
from trap2.tasks.evaluation import Classification, Prediction, Reading, Scored
from trap2.tasks.model import Inputs, device_of, placed

BATCH = 16
"""Rows per forward pass: logits are (N, T, V), and V may be large."""

ENDS = " .,;:!?\"'"
"""What an answer may begin or end with and still be the same; a sign or a unit is no such thing."""

IGNORED = -100
"""Label of positions that carry no target (transformers' convention)."""


@dataclass(frozen=True)
class Tokens:
    """Token ids of one row, and which of them are targets."""

    ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> list[int]:
        """The tokens to predict; nothing comes before the first token to predict it from."""
        return [label for label in self.labels[1:] if label != IGNORED]


def joined(prompt: str, completion: str) -> str:
    """A prompt and what follows it, with a space between them if there is none."""
    seam = prompt[-1:] + completion[:1]
    apart = len(seam) < 2 or seam[0].isspace() or seam[1].isspace()
    return prompt + ("" if apart else " ") + completion


def tokens(
    inputs: Inputs, prompts: Sequence[str], completions: Sequence[str], end: bool = True
) -> list[Tokens]:
    """Tokenise rows.

    Args:
        inputs: The task's tokenizer.
        prompts: What is given; "" for plain text.
        completions: What follows, and is to be predicted.
        end: Whether the completion of a prompt ends with the end token.

    Raises:
        UserError: A row has no target left within `max_length`.
    """
    task, tokenizer = inputs.task, inputs.processor
    texts = [joined(p, c) for p, c in zip(prompts, completions, strict=True)]
    encoded = tokenizer(texts, return_offsets_mapping=True)
    found = []
    for row, (prompt, ids, places) in enumerate(
        zip(prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ):
        # A token that begins in the prompt and ends in the completion is a target.
        ends = (stop for _, stop in places)
        labels = [i if stop > len(prompt) else IGNORED for i, stop in zip(ids, ends, strict=True)]
        if prompt and end and tokenizer.eos_token_id is not None:
            ids, labels = [[*given, tokenizer.eos_token_id] for given in (ids, labels)]
        part = slice(-task.max_length, None) if prompt else slice(task.max_length)
        found.append(Tokens(ids[part], labels[part]))
        if not found[-1].targets:
            raise UserError(
                f"row {row} of task '{task.name}' has no token to predict ({texts[row][:60]!r}); "
                "remove it or raise task.max_length"
            )
    return found


def pairs(
    inputs: Inputs, rows: Sequence[Any], labels: Sequence[Any]
) -> tuple[list[str], list[str]]:
    """Prompts and right completions of the rows of any kind that a language model learns."""
    if inputs.task.kind != "choice":
        return list(rows), list(labels)
    right = [options[label] for (_, options), label in zip(rows, labels, strict=True)]
    return [prompt for prompt, _ in rows], right


def padded(rows: Sequence[Tokens], pad: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels` (N, T) of some rows, padded on the right."""
    longest = max(map(len, rows))

    def filled(values: Iterable[list[int]], filler: int) -> Tensor:
        return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in values])

    return {
        "input_ids": filled((row.ids for row in rows), pad),
        "attention_mask": filled(([1] * len(row) for row in rows), 0),
        "labels": filled((row.labels for row in rows), IGNORED),
    }


def log_likelihoods(model: nn.Module, rows: Sequence[Tokens], pad: int) -> tuple[Tensor, Tensor]:
    """Log-probability (N, T - 1) of each target token, and whether it is the likeliest.

    Positions without a target have 0 and no.

    Args:
        model: Gives `.logits` (N, T, V).
        rows: What is read.
        pad: Any token; it is masked.
    """
    batch = placed(padded(rows, pad), model)
    wanted = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1].float()
    nats = F.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
    return -nats, (logits.argmax(-1) == wanted) & (wanted != IGNORED)


class Completions(Reading):
    """Kind `language`: how well each token of a completion is predicted. See `Reading`."""

    def __init__(self, inputs: Inputs, rows: Sequence[Any], labels: Sequence[Any]) -> None:
        self.batch_size, self.classes = BATCH, 0
        self._pad, self._likelihood = inputs.pad, inputs.task.score == "likelihood"
        self._rows = tokens(inputs, rows, labels)
        self.lengths = [len(row) for row in self._rows]
        self.chance = most_frequent([label for row in self._rows for label in row.targets])

    def read(self, model: nn.Module, places: Sequence[int]) -> Tensor:
        """Right tokens, nats and tokens (n, 3)."""
        rows = [self._rows[i] for i in places]
        found, right = log_likelihoods(model, rows, self._pad)
        counts = torch.tensor([len(row.targets) for row in rows], device=found.device)
        return torch.stack([right.sum(1).float(), -found.sum(1), counts.float()], 1)

    def evaluation(self, outputs: Tensor) -> Prediction:
        """Share of right tokens, or exp(-loss)."""
        return Prediction(outputs, self._likelihood)


class Choices(Reading):
    """Kind `choice`: which of C options is the likeliest to follow. See `Reading`."""

    def __init__(self, inputs: Inputs, rows: Sequence[Any], labels: Sequence[int]) -> None:
        self.batch_size, self.labels = BATCH, torch.tensor(labels)
        self._pad, self._normalised = inputs.pad, inputs.task.length_normalised
        counts = Counter(len(options) for _, options in rows)
        if len(counts) > 1:
            raise UserError(
                f"rows of task '{inputs.task.name}' have {' or '.join(map(str, sorted(counts)))} "
                "options; all need as many, so that outputs have one meaning: part the rows"
            )
        self.classes, self.chance = next(iter(counts)), most_frequent(labels)
        self._characters = torch.tensor([[len(o) for o in options] for _, options in rows])
        flat = [(prompt, option) for prompt, options in rows for option in options]
        self._rows = tokens(inputs, [p for p, _ in flat], [o for _, o in flat], end=False)
        C = self.classes
        self.lengths = [max(map(len, self._rows[i * C : i * C + C])) for i in range(len(labels))]

    def read(self, model: nn.Module, places: Sequence[int]) -> Tensor:
        """Log-likelihood (n, C) of every option, by default per character."""
        C = self.classes
        rows = [row for i in places for row in self._rows[i * C : i * C + C]]
        found = log_likelihoods(model, rows, self._pad)[0].sum(1).reshape(-1, C)
        characters = self._characters[list(places)].to(found.device)
        return found / characters if self._normalised else found

    def evaluation(self, outputs: Tensor) -> Classification:
        """Which rows' right option is the likeliest."""
        return Classification(outputs, self.labels)


class Generations(Reading):
    """Kind `generation`: whether what is generated, greedily, is the answer. See `Reading`."""

    def __init__(self, inputs: Inputs, rows: Sequence[str], labels: Sequence[str]) -> None:
        self.batch_size, self.classes = BATCH, 0
        self._task, self._tokenizer, self._pad = inputs.task, inputs.processor, inputs.pad
        longest = self._task.max_length
        self._rows = [ids[-longest:] for ids in self._tokenizer(list(rows))["input_ids"]]
        self._answers = [normalised(label) for label in labels]
        self.lengths, self.chance = [len(row) for row in self._rows], most_frequent(self._answers)

    def read(self, model: nn.Module, places: Sequence[int]) -> Tensor:
        """1 or 0 (n, 1)."""
        rows = [self._rows[i] for i in places]
        longest = max(map(len, rows))
        ids = torch.tensor([[*[self._pad] * (longest - len(row)), *row] for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        generate: Any = model.generate
        found = generate(
            input_ids=ids.to(device_of(model)),
            attention_mask=mask.to(device_of(model)),
            max_new_tokens=self._task.max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self._pad,
        )
        texts = self._tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)
        if self._task.stop is not None:
            texts = [text.split(self._task.stop)[0] for text in texts]
        right = [normalised(t) == self._answers[i] for t, i in zip(texts, places, strict=True)]
        return torch.tensor(right).float()[:, None]

    def evaluation(self, outputs: Tensor) -> Scored:
        """Which rows are right."""
        return Scored(outputs)


def normalised(text: str) -> str:
    """Text as it is compared: NFKC, no case, single spaces, no marks or quotes at either end."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(ENDS)
