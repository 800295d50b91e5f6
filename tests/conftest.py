"""What holds for every test: no network, no settings from outside, and the markers `gpu` and `slow`."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

FOR_TESTS = {"DDETR_FUZZ_SECONDS"}  # no setting of the service: how long each fuzzer runs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module is imported: libraries read these once.
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in [name for name in os.environ if name.upper().startswith("DDETR_")]:
        if name not in FOR_TESTS:
            del os.environ[name]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        skip_slow = pytest.mark.skip(reason="slow: runs with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip_slow)
    on_gpu = [item for item in items if "gpu" in item.keywords]
    if on_gpu and not has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def has_gpu() -> bool:
    """Whether the driver answers and knows at least one GPU."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    listing = subprocess.run([command, "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU " in listing.stdout
