"""The guide to writing an attack is a promise: its code runs, and its attack is one of many."""

import re
from pathlib import Path

import pytest
import torch

from trap2.attacks import attack as module
from trap2.attacks.attack import load_attacks, merge
from trap2.auditing.plan import check_plan
from trap2.registry import Registry

GUIDE = Path(__file__).parent.parent / "docs" / "write_an_attack.md"


@pytest.fixture
def written(monkeypatch):
    """The names that the code of the guide leaves behind; its attack is forgotten afterwards."""
    fresh = Registry("attack")
    fresh._entries = {name: load_attacks().get(name) for name in load_attacks()}
    monkeypatch.setattr(module, "ATTACKS", fresh)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, names)  # the guide's own code, that is the test
    return names


def test_the_attack_of_the_guide_is_one_like_the_others(written):
    assert load_attacks().get("magmax").function is written["magmax"]
    assert check_plan(written["attacker"], 3) is None
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    updates = [{"w": row} for row in rows]
    merged = dict(merge("magmax", updates, [1.0, 0.0, 1.0]))["w"]
    largest = torch.where(rows[0].abs() >= rows[2].abs(), rows[0], rows[2])
    assert torch.equal(merged, largest)
    assert torch.equal(dict(merge("magmax", updates[:1], 1.0))["w"], rows[0])


def test_the_function_takes_thirty_lines_at_most():
    (code, *_) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 30
