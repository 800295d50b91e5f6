"""Rules of the house that no tool checks."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.main import VERBS, main

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = (
    "bundle",
    "cli",
    "export",
    "loadtest",
    "models",
    "parity",
    "plugins",
    "runtime",
    "samples",
    "server",
    "training",
)
BANNED_NAMES = {"common", "helper", "helpers", "manager", "misc", "util", "utils"}
NOT_FOR_SERVING = ("torch", "onnx", "onnxscript", "safetensors", "scipy", "pycocotools", "transformers", "tensorboard")

PROSE_AND_CONFIGURATION = {".cfg", ".ini", ".md", ".sh", ".toml", ".yaml", ".yml", ""}
A_PERSONS_FOLDER = re.compile(r"(?<![\w.:])/(?:home|work|Users)/\w")
UPWARDS = re.compile(r"(?:\.\./)+[\w./-]*")


def own_files() -> Iterator[Path]:
    """The files of the repository, or of an unpacked sdist."""
    if (ROOT / ".git").exists():
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        paths = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    else:
        paths = [path for package in (*PACKAGES, "tests") for path in (ROOT / package).rglob("*")]
    yield from (path for path in paths if path.is_file() and "__pycache__" not in path.parts)


def texts() -> Iterator[tuple[Path, str]]:
    for path in own_files():
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def words(path: Path) -> set[str]:
    return {word for part in path.relative_to(ROOT).parts for word in re.split(r"[._-]", part.lower())}


def test_a_file_is_one_noun_or_verb() -> None:
    vague = [str(path.relative_to(ROOT)) for path in own_files() if words(path) & BANNED_NAMES]
    assert not vague, f"name these after what they do: {vague}"


def test_no_file_names_a_path_outside_the_repository() -> None:
    outside = []
    for path, text in texts():
        if path == Path(__file__).resolve():
            continue
        found = A_PERSONS_FOLDER.findall(text)
        if path.suffix in PROSE_AND_CONFIGURATION:
            found += [up for up in UPWARDS.findall(text) if not (path.parent / up).resolve().is_relative_to(ROOT)]
        outside += [f"{path.relative_to(ROOT)}: {reference}" for reference in found]
    assert not outside


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed_and_known_to_every_tool(package: str) -> None:
    assert (ROOT / package / "__init__.py").is_file()
    assert (ROOT / package / "py.typed").is_file(), "an installed package without py.typed has no types"
    tool = PROJECT["tool"]
    assert f"{package}*" in tool["setuptools"]["packages"]["find"]["include"]
    assert package in tool["importlinter"]["root_packages"]
    assert package in tool["mypy"]["packages"]
    assert package in tool["ruff"]["lint"]["isort"]["known-first-party"]


def test_the_serving_install_has_no_torch() -> None:
    names = {re.split(r"[\[<>=~! ]", requirement)[0] for requirement in PROJECT["project"]["dependencies"]}
    assert not names & set(NOT_FOR_SERVING)


# Stands in for a host without them: importing one of the names fails as it would there.
WITHOUT = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_FOR_SERVING}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def run_on_serving_host(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT + code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "module", ["server.app", "server.run", "server.detect", "bundle", "plugins", "samples", "cli.main"]
)
def test_serving_modules_import_without_torch(module: str) -> None:
    done = run_on_serving_host(f"import {module}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", ["serve", "detect"])
def test_serving_verbs_work_without_torch(verb: str) -> None:
    done = run_on_serving_host(f"from cli.main import main; main([{verb!r}, '--help'])")
    assert done.returncode == 0, done.stderr
    assert f"ddetr {verb}" in done.stdout


@pytest.mark.parametrize(
    ("verb", "extra"), [("export", "export"), ("build", "export"), ("train", "train"), ("evaluate", "train")]
)
def test_other_verbs_name_the_extra_they_need(verb: str, extra: str) -> None:
    done = run_on_serving_host(f"from cli.main import main; sys.exit(main([{verb!r}, '--help']))")
    assert done.returncode == 2
    assert f"pip install 'ddetr[{extra}]'" in done.stderr
    assert done.stderr.count("\n") == 1, "one line, no traceback"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: ddetr {verb}" in text
    assert re.search(rf"(?i)example.*\n?.*(ddetr {verb}|python3? -m \w+\.\w+) ", text), text
