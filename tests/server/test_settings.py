from pathlib import Path

import pytest
from pydantic import ValidationError

from bundle import embedded_bundle
from server.cores import available_cores
from server.settings import Settings

CONTRACT = {
    "bundle",
    "engine",
    "device",
    "host",
    "port",
    "max_batch_size",
    "max_delay_ms",
    "queue_limit",
    "max_image_pixels",
    "max_body_bytes",
    "decode_threads",
    "engine_instances",
    "default_timeout_ms",
    "api_keys",
}


def test_every_setting_is_there_and_described() -> None:
    assert set(Settings.model_fields) >= CONTRACT
    assert all(field.description for field in Settings.model_fields.values())


def test_defaults_serve_the_embedded_bundle() -> None:
    settings = Settings()
    assert settings.bundle == embedded_bundle()
    assert settings.decode_threads == available_cores()
    assert settings.api_keys == ()


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDETR_BUNDLE", "/models/cells")
    monkeypatch.setenv("DDETR_MAX_DELAY_MS", "2.5")
    monkeypatch.setenv("DDETR_API_KEYS", "first-key, second-key,,")
    settings = Settings()
    assert settings.bundle == Path("/models/cells")
    assert settings.max_delay_ms == 2.5
    assert [key.get_secret_value() for key in settings.api_keys] == ["first-key", "second-key"]
    assert "first-key" not in repr(settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 70_000),
        ("engine", "abacus"),
        ("device", "gpu"),
        ("max_batch_size", 0),
        ("max_delay_ms", -1),
        ("default_timeout_ms", 0),
        ("max_image_pixels", 10**9),
        ("surprise", 1),
    ],
)
def test_what_cannot_be_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        Settings(**{name: value})


def test_a_request_must_fit_the_queue() -> None:
    with pytest.raises(ValidationError, match="max_images_per_request 9 exceeds queue_limit 8"):
        Settings(queue_limit=8, max_images_per_request=9)
    assert Settings(queue_limit=8).queue_limit == 8


def test_a_body_must_fit_the_queue() -> None:
    with pytest.raises(ValidationError, match="max_queued_bytes 99 is less than max_body_bytes 100"):
        Settings(max_queued_bytes=99, max_body_bytes=100)
    assert Settings(max_queued_bytes=100, max_body_bytes=100).max_queued_bytes == 100
    assert Settings(max_body_bytes=100).max_queued_bytes == 0, "which stands for a multiple of it"


@pytest.mark.parametrize(
    ("limit", "expected"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", None), ("?", None)]
)
def test_cores_heed_the_containers_quota(tmp_path: Path, limit: str, expected: int | None) -> None:
    (tmp_path / "cpu.max").write_text(limit)
    without = available_cores(tmp_path / "absent")
    assert available_cores(tmp_path) == min(without, expected or without)


@pytest.mark.parametrize(("quota", "expected"), [("100000", 1), ("150000", 2), ("-1", None), ("x", None)])
def test_cores_heed_the_quota_of_older_control_groups(tmp_path: Path, quota: str, expected: int | None) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    without = available_cores(tmp_path / "absent")
    assert available_cores(tmp_path) == min(without, expected or without)


@pytest.mark.parametrize("given", ["", " ", ",", " , "])
def test_a_list_without_a_key_does_not_open_the_server(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    with pytest.raises(ValidationError, match="no key in it"):
        Settings(api_keys=given)
    monkeypatch.setenv("DDETR_API_KEYS", given)
    with pytest.raises(ValidationError, match="no key in it"):
        Settings()
