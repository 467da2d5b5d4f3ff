"""Audits of a base with batch norm: new statistics of every merge, in the ledger's key too."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MobileNetV2Config, MobileNetV2Model

from trap2.auditing.arena import CONTROL, RELEASE, Arena, Mixture
from trap2.auditing.audit import audit
from trap2.errors import UserError
from trap2.protecting.run import protect
from trap2.recipes import AuditSpec, Recipe

NORMED = "conv_stem.first_conv.normalization.running_mean"
BOTH = Mixture("task_arithmetic", (RELEASE, "other"), (0.6, 0.6))


@pytest.fixture(scope="module")
def settings(pico_vit: Path, pico_images: Path, tmp_path_factory) -> dict[str, Any]:
    """An audit of pico MobileNets, fine-tuned in full on the three colours."""
    root = tmp_path_factory.mktemp("normed")
    torch.manual_seed(0)
    config = MobileNetV2Config(image_size=32, depth_multiplier=0.1, min_depth=8)
    MobileNetV2Model(config).save_pretrained(root / "base")
    processor = json.loads((pico_vit / "preprocessor_config.json").read_text())
    processor |= {"image_processor_type": "MobileNetV2ImageProcessor", "do_center_crop": False}
    processor["size"] = {"height": 32, "width": 32}
    (root / "base" / "preprocessor_config.json").write_text(json.dumps(processor))
    for split, source in (("train", "train"), ("validation", "validation"), ("test", "train")):
        shutil.copytree(pico_images / source, root / "images" / split)

    def made(name: str, strength: float, seed: int) -> dict[str, Any]:
        task = {
            "name": name,
            "kind": "image",
            "data": {"imagefolder": str(root / "images")},
            "classes": ["blue", "green", "red"],
        }
        recipe = {
            "base": str(root / "base"),
            "task": task,
            "method": "full",
            "training": {"steps": 4, "batch_size": 16, "evaluate_every": 4},
            "trap2": {"strength": strength, "warmup": 1, "ramp": 1},
            "seed": seed,
        }
        out = root / f"{name}-{strength}"
        protect(Recipe.model_validate(recipe), out, quiet=True)
        return {"path": str(out), "task": task}

    return {
        "base": str(root / "base"),
        "release": made("colours", 0.5, 0),
        "control": made("colours", 0.0, 0)["path"],
        "partners": [made("other", 0.0, 1)],
        "attacker": {
            "attacks": ["task_arithmetic"],
            "t3_attacks": [],
            "coefficients": [0.0, 0.6],
            "refine": 0,
            "relabel_rows": [],
            "recompute_statistics": True,
            "unlabelled_rows": 10,
            "validation_rows": 20,
            "test_rows": 20,
        },
        "scales": [0.0, 1.0],
    }


def changed(settings: dict[str, Any], **attacker: Any) -> AuditSpec:
    return AuditSpec.model_validate({**settings, "attacker": {**settings["attacker"], **attacker}})


def test_merges_get_new_statistics_a_model_alone_keeps_its_own(settings):
    arena, plain = Arena(changed(settings)), Arena(changed(settings, recompute_statistics=False))
    before = {n: v.clone() for n, v in arena.encoder.state_dict().items()}
    for name in (RELEASE, CONTROL):
        alone = arena.alone(name)
        found = arena.evaluate(alone, name, "test").logits
        assert torch.equal(found, plain.evaluate(alone, name, "test").logits)
    new, old = (one.evaluate(BOTH, RELEASE, "test").logits for one in (arena, plain))
    assert torch.isfinite(new).all()
    assert not torch.allclose(new, old, atol=1e-3)
    assert all(torch.equal(v, before[n]) for n, v in arena.encoder.state_dict().items())


def test_at_another_scale_a_model_alone_gets_new_statistics_too(settings):
    arena, plain = Arena(changed(settings)), Arena(changed(settings, recompute_statistics=False))
    scaled = arena.alone(RELEASE, 5.0)  # where variances that are scaled become negative
    found = arena.evaluate(scaled, RELEASE, "test").logits
    assert torch.isfinite(found).all()
    assert not torch.allclose(
        found, plain.evaluate(scaled, RELEASE, "test").logits, atol=1e-3, equal_nan=True
    )
    base = arena.alone(RELEASE, 0.0)
    expected = plain.evaluate(base, RELEASE, "test").logits
    assert torch.equal(arena.evaluate(base, RELEASE, "test").logits, expected)


def test_inside_they_are_those_of_the_merge_on_rows_of_both_tasks(settings):
    arena = Arena(changed(settings))
    seen = []
    with arena._merged(BOTH):
        layer = arena.encoder.conv_stem.first_conv
        found = arena.encoder.state_dict()[NORMED].clone()
        hook = layer.convolution.register_forward_hook(lambda _, __, out: seen.append(out))
        for batch in arena._mixed(BOTH.members):
            arena.encoder(**batch)
        hook.remove()
    assert sum(len(out) for out in seen) == 20
    torch.testing.assert_close(found, torch.cat(seen).mean((0, 2, 3)))


def test_the_key_holds_them_only_where_they_are_worked_out(settings):
    def keys(mixture: Mixture, **attacker: Any) -> str:
        return Arena(changed(settings, **attacker)).contents.of(mixture, RELEASE, "test").key

    alone = Mixture("task_arithmetic", (RELEASE,), (1.0,))
    assert keys(alone) == keys(alone, recompute_statistics=False)
    scaled = Mixture("task_arithmetic", (RELEASE,), (0.5,))
    assert keys(scaled) != keys(scaled, recompute_statistics=False)
    assert keys(BOTH) != keys(BOTH, recompute_statistics=False)
    assert keys(BOTH) != keys(BOTH, unlabelled_rows=9)
    off = {"recompute_statistics": False}
    assert keys(BOTH, **off) == keys(BOTH, **off, unlabelled_rows=9)


def test_an_audit_tries_it_in_every_tier_and_does_not_doubt_it(settings):
    spec = changed(
        settings,
        data_attacks=["fisher", "adamerging"],
        grids={"adamerging": {"steps": [2]}},
        recovery=["probe", "finetune_before", "finetune_after"],
        recovery_rows=[6],
        recovery_steps=[2],
    )
    report = audit(spec)
    assert list(report.tiers) == ["T1", "T4", "T5"]
    assert report.settings["recompute_statistics"] is True
    assert "T011" not in [flag.code for flag in report.flags]
    assert "T011" in [f.code for f in audit(changed(settings, recompute_statistics=False)).flags]


def test_a_base_without_such_layers_is_refused(shelf):
    spec = AuditSpec.model_validate(shelf.audit("lora", recompute_statistics=True))
    with pytest.raises(UserError, match="has no batch-norm layers with running statistics; remove"):
        Arena(spec)
