"""Fixtures that are dear to make and never changed: made once for the whole run."""

from pathlib import Path

import pico
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "trap2", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("trap2")


@pytest.fixture(scope="session")
def pico_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one random pico BERT with its tokenizer; read it, never write into it."""
    return pico.save_base(tmp_path_factory.mktemp("pico") / "base")
