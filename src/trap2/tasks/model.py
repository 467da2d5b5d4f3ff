"""A base model with a task's head on it: what is trained, evaluated and merged.

Tasks without classes are the base's own language model, which has no other head. With classes there
are two heads: a classifier (trained with the task, released beside the update, as in
`AutoModelForSequenceClassification`), or frozen class descriptions (a sentence encoder reads one
sentence a class; logits = temperature * cosine of mean-pooled embeddings), which has no weights of
its own. Either way the encoder is one module that merges change in place.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

from trap2.checkpoint import Checkpoint
from trap2.errors import Trap2Error, UserError
from trap2.taskspec import TaskSpec
from trap2.update import Update

WANTED_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


def base_folder(base: str) -> Path:
    """The local folder of a base: itself, or the Hub snapshot of an id.

    Raises:
        UserError: Neither a folder nor reachable on the Hub, or without safetensors weights.
    """
    folder = Path(base)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            folder = Path(snapshot_download(base, allow_patterns=WANTED_FILES))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(
                f"base '{base}' is no folder here and cannot be had from the Hub "
                f"({type(error).__name__}); check the path, the id or the network"
            ) from error
    Checkpoint(folder)
    return folder


class Inputs:
    """Turns rows into batches of tensors with the base's own tokenizer or image processor."""

    def __init__(self, base: Path, task: TaskSpec) -> None:
        self.task = task
        auto: Any = AutoImageProcessor if task.kind == "image" else AutoTokenizer
        what = "image processor" if task.kind == "image" else "tokenizer"
        try:
            self.processor = auto.from_pretrained(base)
        except (OSError, ValueError) as error:
            raise UserError(_no_processor(base, what)) from error
        # Without these files transformers makes up an empty vocabulary.
        files = getattr(self.processor, "vocab_files_names", {}).values()
        if files and not any((base / file).is_file() for file in files):
            raise UserError(_no_processor(base, what))

    def encode(self, rows: list[Any]) -> list[Any]:
        """Per-row form, computed once: token ids of a text; an image stays as it is."""
        if self.task.kind == "image":
            return rows
        texts = self.processor(rows, truncation=True, max_length=self.task.max_length)
        ids: list[Any] = texts["input_ids"]
        return ids

    @property
    def pad(self) -> int:
        """A token to fill rows with, where it is masked; many language models have none of it."""
        known = (self.processor.pad_token_id, self.processor.eos_token_id, 0)
        return next(token for token in known if token is not None)

    def batch(self, encoded: list[Any]) -> dict[str, Tensor]:
        """Tensors of one batch, padded to its longest row."""
        if self.task.kind == "image":
            images = [image.convert("RGB") for image in encoded]
            return dict(self.processor(images, return_tensors="pt"))
        return dict(self.processor.pad({"input_ids": encoded}, return_tensors="pt"))


def _no_processor(base: Path, what: str) -> str:
    return f"base {base} has no usable {what}; copy its files beside the weights"


class DescriptionClassifier(nn.Module):
    """A sentence encoder under a frozen head of class descriptions.

    Args:
        encoder: Gives `last_hidden_state` (N, T, D).
        prototypes: (C, D) unit vectors, one a class.
        temperature: Multiplies the cosine.
    """

    prototypes: Tensor
    accepts_loss_kwargs = False  # the loss is a mean over rows, whatever the trainer counts

    def __init__(self, encoder: nn.Module, prototypes: Tensor, temperature: float) -> None:
        super().__init__()
        self.encoder, self.temperature = encoder, temperature
        self.register_buffer("prototypes", prototypes, persistent=False)

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> SequenceClassifierOutput:
        """Logits (N, C), and the cross-entropy when labels (N,) are given."""
        logits = self.temperature * embed(self.encoder, inputs) @ self.prototypes.T
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def compute_device() -> torch.device:
    """Where models are run: the first GPU that torch sees, or else the processor.

    `CUDA_VISIBLE_DEVICES` says which GPU that is, and hides all of them where it is empty.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs belong."""
    return next(model.parameters()).device


def placed(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A batch where the model is."""
    device = device_of(model)
    return {name: value.to(device) for name, value in batch.items()}


def embed(encoder: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Mean-pooled unit embeddings (N, D) of a batch of sentences."""
    hidden: Tensor = encoder(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def load_encoder(base: Path, language: bool = False) -> nn.Module:
    """The base encoder, float32, in evaluation mode, on a GPU if there is one.

    It refuses to run with invented weights.

    Args:
        base: Folder of the base.
        language: Load the whole causal language model, with its output layer.

    Raises:
        UserError: The base has no such model.
        Trap2Error: transformers would have initialised encoder weights at random.
    """
    auto: Any = AutoModelForCausalLM if language else AutoModel
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        loaded: tuple[nn.Module, dict[str, Any]] = auto.from_pretrained(
            base,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,  # nor asked about: a release is a stranger's
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load base {base}: {reason}; check config.json") from error
    finally:
        logging.set_verbosity(verbosity)
    model, info = loaded
    invented = [name for name in info["missing_keys"] if "pooler" not in name]
    if invented:
        raise Trap2Error(
            f"base {base} lacks {len(invented)} weights, such as '{sorted(invented)[0]}'; "
            "they would be random: give a complete checkpoint"
        )
    # Convolutions are faster so, on processors and GPUs.
    return model.to(compute_device(), memory_format=torch.channels_last).eval()  # type: ignore[call-overload, no-any-return]


def build(base: Path, task: TaskSpec, encoder: nn.Module, inputs: Inputs) -> nn.Module:
    """Put a task's head on an encoder; the encoder stays the same object.

    A task of a language model has no head of its own: the model is the encoder.

    Args:
        base: Folder of the base, for its configuration.
        task: The task.
        encoder: From `load_encoder`, holding the base weights (descriptions are read with them).
            A language model serves tasks with classes too, without its output layer.
        inputs: The task's tokenizer or image processor.
    """
    if task.is_language:
        return encoder
    encoder = cast(nn.Module, getattr(encoder, "base_model", encoder))
    if task.descriptions is not None:
        with torch.no_grad():
            read = placed(inputs.batch(inputs.encode(list(task.descriptions))), encoder)
            prototypes = embed(encoder, read)
        return DescriptionClassifier(encoder, prototypes, task.temperature).eval()
    image = task.kind == "image"
    auto: Any = AutoModelForImageClassification if image else AutoModelForSequenceClassification
    config = AutoConfig.from_pretrained(base, num_labels=len(task.classes))
    if not image and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = inputs.processor.pad_token_id
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = auto.from_config(config)
    except ValueError as error:
        what = "image" if image else "text"
        raise UserError(
            f"base {base} ({config.model_type}) has no {what} classification head in "
            "transformers; give task.descriptions or another base"
        ) from error
    _refuse_invented_pooler(base, getattr(model, str(model.base_model_prefix)))
    setattr(model, str(model.base_model_prefix), encoder)
    return model.to(device_of(encoder)).eval()


def _refuse_invented_pooler(base: Path, encoder: nn.Module) -> None:
    """A pooler the head reads must come from the base: a random one is not in any release."""
    pooler = getattr(encoder, "pooler", None)
    read = isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters())
    if read and not any("pooler." in name for name in Checkpoint(base).names):
        raise UserError(
            f"base {base} has no pooler, which its classification head reads and which would be "
            "random; give task.descriptions or another base"
        )


def load_release(update: Update, task: TaskSpec) -> nn.Module:
    """A release as its users have it, loaded by transformers and peft: no update is worked out.

    Raises:
        UserError: They cannot load it.
    """
    base, release = update.base.folder, update.folder
    language = task.is_language
    model: Any = build(base, task, load_encoder(base, language), Inputs(base, task))
    described = isinstance(model, DescriptionClassifier)
    load_head(model, task, update.head, release)
    try:
        if update.kind == "full":
            encoder = load_encoder(release, language)
            if language:
                return encoder
            setattr(model, "encoder" if described else model.base_model_prefix, encoder)
        elif (release / "adapter_model.safetensors").is_file():
            (model.encoder if described else model).load_adapter(str(release))
        else:  # without that file transformers would go on to look for a pickle
            raise OSError("it has no adapter_model.safetensors")
    except (LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load {release} as a model: {reason}; save it again") from error
    loaded: nn.Module = model.eval()
    return loaded


def load_head(model: nn.Module, task: TaskSpec, head: dict[str, Tensor], release: Path) -> None:
    """Give a classifier its released head; every head weight must be there.

    Raises:
        UserError: Head tensors are missing or of another shape, or there are some beside a
            language model, which has no use for them.
    """
    if task.is_language and head:
        raise UserError(
            f"{release} has tensor '{sorted(head)[0]}', which the language model it was made from "
            f"does not have; task '{task.name}' needs a release of the language model alone"
        )
    if task.is_language or isinstance(model, DescriptionClassifier):
        return
    prefix = str(model.base_model_prefix) + "."
    wanted = {n: p for n, p in model.state_dict().items() if not n.startswith(prefix)}
    for name, own in wanted.items():
        if name not in head or head[name].shape != own.shape:
            found = tuple(head[name].shape) if name in head else "nothing"
            raise UserError(
                f"{release} has {found} for head tensor '{name}', {tuple(own.shape)} is needed; "
                "check task.classes and that the release includes its head"
            )
    model.load_state_dict({name: head[name] for name in wanted}, strict=False)
