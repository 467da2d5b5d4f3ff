"""A base's files in place of a copy of it: the same gradients, and memory for one copy less."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel

import pico
from trap2.errors import UserError
from trap2.protecting.config import Trap2Config
from trap2.protecting.protector import Protector
from trap2.protecting.scaled import LiveUpdate

TRAP = {"warmup": 0, "ramp": 0, "closing": 0}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A bare encoder; under a head its parameters have longer names."""
    return pico.save_base(tmp_path / "base")


def classifier(base: Path, **how: object) -> BertForSequenceClassification:
    torch.manual_seed(1)
    return BertForSequenceClassification.from_pretrained(base, num_labels=3, **how).train()


def trained(
    base: Path, *, dtype: torch.dtype | None = None, **settings: object
) -> dict[str, Tensor]:
    model = classifier(base, dtype=dtype)
    protector = Protector(model, Trap2Config(**TRAP, **settings))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(2)
    for _ in range(3):
        ids = torch.randint(2, 40, (12, 6))
        protector.backward({"input_ids": ids, "labels": ids[:, 0] % 3})
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def kept(model: nn.Module, base_files: str) -> int:
    """Bytes of the starts an update holds, by what their closures reach."""
    total = 0
    for item in LiveUpdate(model, base_files).shared:
        cells = item.origin.__closure__ or ()
        held = [c.cell_contents for c in cells if isinstance(c.cell_contents, Tensor)]
        total += sum(tensor.nbytes for tensor in held)
    return total


def test_training_is_bit_for_bit_that_with_copies(base):
    copies, files = trained(base), trained(base, base_files=str(base))
    assert copies.keys() == files.keys()
    assert all(torch.equal(copies[name], files[name]) for name in copies)


def test_what_the_files_hold_is_not_held_twice(base):
    model = classifier(base)
    encoder = [p for n, p in model.named_parameters() if "classifier" not in n]
    whole = sum(p.nbytes for p in encoder if p.dim() > 1)
    vectors = sum(p.nbytes for p in encoder if p.dim() == 1)  # ones and zeros: half holds them
    assert kept(model, "") == whole + vectors // 2
    assert kept(model, str(base)) == 0


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_the_start_of_a_base_in_half_precision_is_kept_in_half(base, tmp_path, half):
    folder = tmp_path / "half"
    BertModel.from_pretrained(base, dtype=half).save_pretrained(folder)

    model = classifier(folder, dtype=torch.float32)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    encoder = sum(p.nbytes for n, p in model.named_parameters() if "classifier" not in n)
    assert kept(model, "") == encoder // 2
    changed = model.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        changed[3, 2] += 1e-6  # no longer what half precision holds
    assert kept(model, "") == encoder // 2 + changed.nbytes // 2
    narrow = trained(folder, dtype=torch.float32)
    files = trained(folder, dtype=torch.float32, base_files=str(folder))
    assert all(torch.equal(narrow[name], files[name]) for name in narrow)


def test_a_tensor_that_differs_is_copied(base):
    model = classifier(base)
    changed = model.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        changed[3, 2] += 1e-3
    assert kept(model, str(base)) == changed.nbytes


def test_files_in_half_precision_serve_where_they_are_exact(base, tmp_path):
    half = tmp_path / "half"
    BertModel.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    model = BertForSequenceClassification.from_pretrained(half, num_labels=3, dtype=torch.float32)
    assert kept(model, str(half)) == 0
    assert kept(classifier(base), str(half)) > 0  # rounded there
    update = LiveUpdate(model, str(half))
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)
    with update.at(0.5):
        for item in update.shared:
            start = before[[id(p) for p in model.parameters()].index(id(item.parameter))]
            assert torch.equal(item.parameter, start.lerp(start + 0.5, 0.5))


def refused(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_files_that_change_stop_training_before_the_weights_take_it(base):
    model = classifier(base)
    protector = Protector(model, Trap2Config(**TRAP, base_files=str(base)))
    before = [p.detach().clone() for p in model.parameters()]
    BertModel.from_pretrained(pico.save_base(base.parent / "other", seed=5)).save_pretrained(base)
    ids = torch.randint(2, 40, (12, 6))
    refused(
        lambda: protector.backward({"input_ids": ids, "labels": ids[:, 0] % 3}),
        f"{base} changed while a model was trained from it (base_files); leave the base alone "
        "until training has ended, or set base_files to a copy of it",
    )
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_folder_without_weights_is_refused(base, tmp_path):
    model = classifier(base)
    refused(lambda: LiveUpdate(model, str(tmp_path / "none")), "none is not a folder; give")


def test_a_folder_of_another_model_is_refused(base, tmp_path):
    model = classifier(base)
    other = pico.save_base(tmp_path / "other", seed=7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "LayerNorm" in name or "bias" in name:  # ones and zeros in every model
                p.add_(0.1)
    refused(
        lambda: LiveUpdate(model, str(other)),
        f"base_files={other} holds none of the weights that training starts from; give the folder "
        "that the model was loaded from",
    )
