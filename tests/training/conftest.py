"""Data that several tests read and none changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.tiny import write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four smears to train on and two to validate."""
    return write_data(tmp_path_factory.mktemp("smears"))
