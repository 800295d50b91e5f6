from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from bundle import BundleError
from cli.handover import hand_over
from cli.main import INTERRUPTED, VERBS, main
from server.version import version


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **functions: object) -> None:
    module = ModuleType(name)
    for function, body in functions.items():
        setattr(module, function, body)
    monkeypatch.setitem(sys.modules, name, module)


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)
    assert "example" in text


def test_unknown_verb_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["sreve"])
    assert left.value.code == 2
    assert "'sreve'" in capsys.readouterr().err


def test_arguments_after_the_verb_reach_it_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    stand_in(monkeypatch, "cli.train", run=lambda argv: seen.append(list(argv)) or 7)
    assert main(["train", "--data", "d", "--help", "--", "-x"]) == 7
    assert seen == [["--data", "d", "--help", "--", "-x"]]


def test_interrupt_has_the_shell_s_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    stand_in(monkeypatch, "cli.train", run=interrupted)
    assert main(["train"]) == INTERRUPTED


def test_version_without_an_installation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def nothing_installed(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nothing_installed)
    version.cache_clear()
    try:
        with pytest.raises(SystemExit):
            main(["--version"])
        assert capsys.readouterr().out == "ddetr unknown\n"
    finally:
        version.cache_clear()


def test_handed_over_command_speaks_under_the_verb_s_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    stand_in(monkeypatch, "training.train", main=lambda argv: seen.append((sys.argv[0], argv)))
    before = sys.argv[0]
    assert hand_over("train", "training.train", "train", ("--epochs", "1")) == 0
    assert seen == [("ddetr train", ["--epochs", "1"])]
    assert sys.argv[0] == before


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def absent(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("cli.handover.importlib.import_module", absent)
    assert hand_over("train", "training.train", "train", ()) == 2
    assert capsys.readouterr().err == (
        f"ddetr train needs the train extra: {sys.executable} -m pip install 'ddetr[train]' (torch is not installed)\n"
    )


def test_a_module_of_ours_that_is_missing_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'training.recipe'", name="training.recipe")

    monkeypatch.setattr("cli.handover.importlib.import_module", absent)
    with pytest.raises(ModuleNotFoundError, match="recipe"):
        hand_over("train", "training.train", "train", ())


def test_broken_bundle_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(argv: list[str]) -> int:
        raise BundleError("manifest.json: no such file")

    stand_in(monkeypatch, "export.onnx_export", main=broken)
    assert hand_over("export", "export.onnx_export", "export", ()) == 1
    assert capsys.readouterr().err == "ddetr export: manifest.json: no such file\n"


def test_a_reader_that_leaves_is_no_traceback() -> None:
    code = """
import sys, types
verb = types.ModuleType("cli.train")
verb.run = lambda argv: print("line\\n" * 100_000) or 0
sys.modules["cli.train"] = verb
from cli.main import main
sys.exit(main(["train"]))
"""
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | head -n 1; exit "${PIPESTATUS[0]}"', sys.executable, code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "line\n"
    assert done.stderr == ""
    assert done.returncode == 1


def test_without_a_verb_the_verbs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    told = capsys.readouterr().err
    assert all(f"  {verb} " in told for verb in VERBS)
