"""Fixtures: what is dear to make and never changed is made once for the whole run."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import pico

# Tests feed models where they are made; on a GPU, name it: CUDA_VISIBLE_DEVICES=0 make test.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

settings.register_profile(
    "trap2", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("trap2")


@pytest.fixture(scope="session")
def pico_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one random pico BERT with its tokenizer; read it, never write into it."""
    return pico.save_base(tmp_path_factory.mktemp("pico") / "base")


@pytest.fixture(scope="session")
def pico_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one random pico ViT with its image processor; read it, never write into it."""
    import torch
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("pico") / "vit"
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        initializer_range=0.3,
    )
    ViTModel(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 8, "width": 8},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="session")
def pico_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder whose class is the brightest of the three colours: red, blue or green."""
    import numpy as np
    from PIL import Image

    folder, draw = tmp_path_factory.mktemp("pico") / "images", np.random.default_rng(0)
    for split, count in (("train", 16), ("validation", 8)):
        for colour, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 100, (8, 8, 3), dtype=np.uint8)
                pixels[..., colour] += 150
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def pico_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one random pico Llama with its tokenizer; read it, never write into it."""
    import trainees

    folder = tmp_path_factory.mktemp("pico") / "llama"
    trainees.llama().save_pretrained(folder)  # type: ignore[operator]
    trainees.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(params=["passing", "arriving", "apart"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way of judging the trap's gradients, whatever share of the model is trained."""
    little = 1.0 if request.param == "apart" else 0.0
    monkeypatch.setattr("trap2.protecting.keeping.LITTLE", little)
    if request.param == "passing":  # as where several processes train
        monkeypatch.setattr("trap2.protecting.keeping.processes", lambda: 2)
    name: str = request.param
    return name
