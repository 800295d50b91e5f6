from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from bundle import Bundle
from server.app import create_app
from server.settings import Settings
from tests.server.fake_engine import FakeEngine
from tests.server.tiny_bundle import write_tiny_bundle


@pytest.fixture
def settings() -> Settings:
    # An engine that a test holds is not to be taken for one that hangs, however slow the machine.
    return Settings(bundle=Path("no-bundle"), decode_threads=2, stall_timeout_ms=60_000)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.gate.set()  # lets the engine's thread go, whatever the test left it in


@pytest.fixture
def app(settings: Settings, engine: FakeEngine) -> FastAPI:
    return create_app(settings, engine)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")
