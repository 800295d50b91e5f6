import asyncio
import logging
import os
import time
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from server import keys as keys_module
from server.app import create_app
from server.errors import StartupError, Unauthorized
from server.keys import ApiKeys
from server.settings import Settings
from tests.server.fake_engine import FakeEngine

FIXED = [SecretStr("first"), SecretStr("zweiter Schlüssel")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nold-key-1  # Ada's\n  old-key-2\n")
    return file


def replace(file: Path, content: bytes) -> None:
    """Put another file in its place, as deployments do; a new inode, so that no clock is too coarse to tell."""
    beside = file.with_suffix(".new")
    beside.write_bytes(content)
    os.replace(beside, file)


def opens(keys: ApiKeys, *given: str) -> list[bool]:
    """Whether each of them is let in."""

    def tried(key: str) -> bool:
        try:
            keys.check(Headers({"Authorization": f"Bearer {key}"}))
        except Unauthorized:
            return False
        return True

    return [tried(key) for key in given]


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer first"},
        {"authorization": "bearer  first "},
        {"X-API-Key": "first"},
        {"X-API-Key": "zweiter Schlüssel".encode().decode("latin-1")},  # as the bytes of headers are read
        {"Authorization": "Basic " + b64encode(b"anyone:first").decode()},
        {"Authorization": "Basic " + b64encode("x:zweiter Schlüssel".encode()).decode()},
        {"Authorization": "Basic " + b64encode(b"x:stale").decode(), "X-API-Key": "first"},  # what a page adds
    ],
)
def test_any_of_the_keys_opens(headers: dict[str, str]) -> None:
    ApiKeys(FIXED).check(Headers(headers))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer firs"},
        {"Authorization": "Bearer first second"},
        {"Authorization": "Basic first"},
        {"Authorization": "Basic first", "X-API-Key": "First"},
        {"X-API-Key": ""},
        {"X-API-Key": "\xff" * 1000},
    ],
)
def test_nothing_else_opens_and_the_refusal_shows_nothing(headers: dict[str, str]) -> None:
    with pytest.raises(Unauthorized) as refused:
        ApiKeys(FIXED).check(Headers(headers))
    assert str(refused.value) == "this server needs an API key: Authorization: Bearer KEY"


def test_without_keys_the_door_is_open() -> None:
    keys = ApiKeys()
    assert not keys.required
    keys.check(Headers({}))


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("hmac.compare_digest", compare)
    assert opens(ApiKeys(FIXED), "first", "a much longer key that is wrong") == [True, False]
    assert len(compared) == 4  # the one that matches ends nothing
    assert {len(side) for pair in compared for side in pair} == {32}  # nor does a length tell anything


def test_a_file_of_keys_with_comments_beside_those_of_the_settings(file: Path) -> None:
    keys = ApiKeys(FIXED, file)
    assert opens(keys, "first", "old-key-1", "old-key-2", "Ada's", "#", "ours") == [True, True, True] + [False] * 3


def test_a_new_file_takes_over_and_no_restart_is_needed(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keys = ApiKeys(FIXED, file)
    replace(file, b"new-key\n")
    keys.refresh()
    assert opens(keys, "first", "old-key-1", "new-key") == [True, False, True]
    assert "1 keys" in caplog.text
    assert "new-key" not in caplog.text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no key in it"),
        (b"# only a comment\n\n", "no key in it"),
        (b"secret-1\nsecret-2 secret-3\n", "line 2 holds 2 words"),
        (b"secret-1 \xff\n", "not UTF-8"),
        ("secret-1\nschlüssel\n".encode(), "line 2: a key has characters that no header can carry"),
        (b"secret-1\x00\n", "line 1: a key has characters"),
        (b"secret-1\n" * 200_000, "more than 1048576 bytes"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_good_changes_nothing_and_is_an_error_once(
    file: Path, content: bytes | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ApiKeys((), file)
    if content is None:
        file.unlink()
    else:
        replace(file, content)
    for _ in range(3):
        keys.refresh()
    assert opens(keys, "old-key-1", "secret-1") == [True, False]
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert reason in record.getMessage()
    assert str(file) in record.getMessage()
    assert "secret" not in record.getMessage().replace(str(file), "")
    replace(file, b"new-key")
    keys.refresh()
    assert opens(keys, "old-key-1", "new-key") == [False, True]


def test_a_file_that_is_no_good_at_the_start_stops_it(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="api_keys_file .*absent: No such file"):
        create_app(Settings(api_keys_file=tmp_path / "absent"), FakeEngine())
    (tmp_path / "empty").touch()
    with pytest.raises(StartupError, match="no key in it"):  # or the door would be open
        create_app(Settings(api_keys_file=tmp_path / "empty"), FakeEngine())


def test_keys_are_changed_under_a_running_server(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "_CHECK_EVERY_S", 0.01)

    def statuses(client: TestClient, keys: Sequence[str]) -> list[int]:
        return [client.get("/model", headers={"X-API-Key": key}).status_code for key in keys]

    with TestClient(create_app(Settings(api_keys_file=file), FakeEngine())) as client:
        assert statuses(client, ["old-key-1", "new-key"]) == [200, 401]
        replace(file, b"new-key\n")
        until = time.monotonic() + 30
        while statuses(client, ["new-key"]) == [401] and time.monotonic() < until:
            pass
        assert statuses(client, ["old-key-1", "new-key"]) == [401, 200]


def test_the_watch_outlives_what_nobody_foresaw(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "_CHECK_EVERY_S", 0.01)
    refreshes: list[bool] = []

    def refresh() -> None:
        refreshes.append(True)
        raise RuntimeError("told to")

    async def watch_for_two() -> None:
        keys = ApiKeys((), file)
        monkeypatch.setattr(keys, "refresh", refresh)
        watching = asyncio.create_task(keys.watch())
        while len(refreshes) < 2 and not watching.done():
            await asyncio.sleep(0.001)
        assert not watching.done(), "who was to lose a key keeps it"
        watching.cancel()

    asyncio.run(watch_for_two())


def test_keys_are_nowhere_to_be_seen(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    settings = Settings(api_keys="first-key", api_keys_file=file)
    app = create_app(settings, FakeEngine())
    shown = [repr(settings), str(settings), repr(ApiKeys(settings.api_keys, file)), repr(vars(ApiKeys((), file)))]
    with TestClient(app) as client:
        for key in ("first-key", "old-key-1", "wrong-key"):
            headers = {"X-API-Key": key}
            shown += [client.get(path, headers=headers).text for path in ("/model", "/metrics", "/nowhere", "/docs")]
            shown.append(client.post("/detect?threshold=2", headers=headers).text)
    shown.append(caplog.text)
    for text in shown:
        assert not any(key in text for key in ("first-key", "old-key-1", "wrong-key"))


def test_behind_a_prefix_the_same_paths_are_open() -> None:
    client = TestClient(create_app(Settings(api_keys="first-key"), FakeEngine()), root_path="/cells")
    assert client.get("/cells/livez").status_code == 200
    assert client.get("/cells/model").status_code == 401
    assert client.post("/cells/detect").status_code == 401
    metrics = client.get("/cells/metrics", headers={"X-API-Key": "first-key"}).text
    assert 'ddetr_rejected_total{reason="unauthorized"} 1.0' in metrics


@pytest.mark.parametrize("path", ["/", "/docs", "/sample.jpg", "/openapi.json", "/model", "/metrics", "/nowhere"])
def test_with_keys_all_but_health_is_closed(path: str) -> None:
    with TestClient(create_app(Settings(api_keys="first"), FakeEngine())) as client:
        assert [client.get(health).status_code for health in ("/livez", "/readyz")] == [200, 200]
        assert client.get(path).status_code == 401
        for wrong in ("Basic !", "Basic " + b64encode(b"first:").decode(), "Basic " + b64encode(b"first").decode()):
            assert client.get(path, headers={"Authorization": wrong}).status_code == 401
        assert client.get(path, auth=("", "first")).status_code in (200, 404)


def test_a_browser_is_told_to_ask_for_the_key_of_a_page_and_a_program_is_not() -> None:
    with TestClient(create_app(Settings(api_keys="first"), FakeEngine())) as client:
        assert client.get("/").headers["www-authenticate"].startswith("Basic ")
        assert client.get("/model").headers["www-authenticate"] == "Bearer"


def test_what_a_browser_adds_by_itself_is_of_no_use_to_other_sites_nor_to_administer() -> None:
    given = {"Authorization": "Basic " + b64encode(b"x:first").decode()}
    settings = Settings(api_keys="first", admin_keys="first")
    with TestClient(create_app(settings, FakeEngine())) as client:
        for site, status in (("none", 200), ("same-origin", 200), ("same-site", 401), ("cross-site", 401)):
            assert client.get("/model", headers={**given, "Sec-Fetch-Site": site}).status_code == status
        assert client.get("/admin/bundle", headers=given).status_code == 401
        assert client.get("/admin/bundle", headers={"X-API-Key": "first"}).status_code == 200
