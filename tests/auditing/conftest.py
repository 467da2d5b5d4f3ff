"""Pico releases and audits that several tests look at."""

from pathlib import Path

import pytest

from auditing.shelf import Shelf, stock
from trap2.auditing.arena import Arena
from trap2.auditing.audit import audit
from trap2.recipes import AuditSpec
from trap2.schema import Report


@pytest.fixture(scope="session")
def shelf(pico_base: Path) -> Shelf:
    return stock(pico_base)


@pytest.fixture(scope="session")
def arenas(shelf: Shelf) -> dict[str, Arena]:
    """A real arena of each kind; evaluations are remembered, everything else stays as it is."""
    return {kind: Arena(AuditSpec.model_validate(shelf.audit(kind))) for kind in ("lora", "full")}


@pytest.fixture(scope="session")
def reports(shelf: Shelf) -> dict[str, Report]:
    """A whole audit of each kind."""
    return {kind: audit(AuditSpec.model_validate(shelf.audit(kind))) for kind in ("lora", "full")}
