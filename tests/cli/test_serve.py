from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bundle import BundleMissing
from cli.main import main
from cli.serve import read_settings
from server.errors import StartupError
from server.settings import Settings


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        read_settings(argv)
    assert left.value.code == 2
    return capsys.readouterr().err


def test_without_flags_the_defaults_hold() -> None:
    assert read_settings([]) == Settings()


def test_every_setting_has_its_flag_and_names_its_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        read_settings(["--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert re.search(rf"--{name.replace('_', '-')}[ ,]", text)
        assert f"DDETR_{name.upper()}]" in text
        assert field.description is not None
        assert field.description in text


def test_flags_are_read_as_their_types(tmp_path: Path) -> None:
    settings = read_settings(["--bundle", str(tmp_path), "--port", "9000", "--max-delay-ms", "2.5"])
    assert settings.bundle == tmp_path
    assert settings.port == 9000
    assert settings.max_delay_ms == 2.5


def test_a_flag_wins_over_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDETR_PORT", "9001")
    monkeypatch.setenv("DDETR_MAX_BATCH_SIZE", "3")
    settings = read_settings(["--port", "9000"])
    assert (settings.port, settings.max_batch_size) == (9000, 3)


def test_keys_are_a_list_with_commas_as_in_the_environment() -> None:
    keys = read_settings(["--api-keys", "first,second"]).api_keys
    assert [key.get_secret_value() for key in keys] == ["first", "second"]


def test_a_refused_value_is_named_with_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["--port", "70000", "--max-batch-size", "none"], capsys)
    assert "--port: Input should be less than or equal to 65535, not '70000'" in message
    assert "--max-batch-size: " in message
    assert "'none'" in message


def test_a_refused_variable_is_named_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DDETR_ENGINE", "abacus")
    assert "--engine: " in refused([], capsys)


def test_flags_that_contradict_each_other_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "exceeds queue_limit 2" in refused(["--queue-limit", "2", "--max-images-per-request", "8"], capsys)


def test_unknown_and_shortened_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--prot" in refused(["--prot", "1"], capsys)
    assert "--max-batch" in refused(["--max-batch", "1"], capsys)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """What `server.run.serve` was called with."""
    calls: list[Settings] = []
    module = ModuleType("server.run")
    module.serve = lambda settings: calls.append(settings) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "server.run", module)
    return calls


def test_serve_hands_the_settings_over(served: list[Settings]) -> None:
    assert main(["serve", "--port", "9000"]) == 0
    assert [settings.port for settings in served] == [9000]


@pytest.mark.parametrize("kind", [BundleMissing, StartupError])
def test_what_cannot_be_served_is_one_line(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_bundle(settings: Settings) -> int:
        raise kind(f"{settings.bundle}: no such folder")

    module = ModuleType("server.run")
    module.serve = no_bundle  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "server.run", module)
    assert main(["serve", "--bundle", "/nowhere"]) == 1
    assert capsys.readouterr().err == "ddetr serve: /nowhere: no such folder\n"


def test_a_refused_device_is_told_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["--device", "foo"], capsys)
    field = Settings.model_fields["device"]
    assert f"--device: expected {field.description}, not 'foo'" in message
    assert "^" not in message


def test_help_shows_no_python(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--help"])
    assert "()" not in capsys.readouterr().out


def test_a_misspelt_variable_is_told_before_serving(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DDETR_BUNDEL", "/bundles/r50")
    monkeypatch.setenv("ddetr_port", "9000")
    run = ModuleType("server.run")
    run.serve = lambda _: 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "server.run", run)
    assert main(["serve"]) == 0
    assert capsys.readouterr().err == "ddetr serve: DDETR_BUNDEL is no setting; DDETR_BUNDLE is\n"
