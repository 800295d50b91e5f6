"""The fuzzer of picture files for a short while, and whether it would notice."""

import os
from pathlib import Path

import pytest

from server.errors import FormatUnsupported, ImageAnimated
from server.headers import read_header
from tests.fuzz import images

SECONDS = float(os.environ.get("DDETR_FUZZ_SECONDS", "25"))


def test_no_damaged_picture_gets_a_500_a_crash_or_no_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = images.main(["--seconds", str(SECONDS), "--seed", "1", "--save", str(tmp_path)])
    said = capsys.readouterr().out
    assert status == 0, said
    assert int(said.split()[0]) > 10 * SECONDS, said


def test_a_crash_is_laid_to_its_file_and_the_file_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seconds", "4", "--seed", "3", "--first", "90", "--die-at", "101", "--save", str(tmp_path)]
    assert images.main(arguments) == 1
    said = capsys.readouterr().out
    assert "seed3-101.bin: killed the process: SIGSEGV" in said
    assert ": 1 failures" in said
    assert (tmp_path / "seed3-101.bin").read_bytes() == images.make_case(3, 101, images.seeds())


def test_good_files_are_good() -> None:
    refused = 0
    for file in images.seeds():
        try:
            header = read_header(file, images.PIXEL_LIMIT)
        except (FormatUnsupported, ImageAnimated):
            refused += 1
        else:
            assert (header.width, header.height) in {(64, 48), (64, 64)}
    assert refused == 3  # the GIF, and the animated PNG and WebP


def test_a_case_follows_from_its_seed_and_number() -> None:
    files = images.seeds()
    assert images.make_case(1, 5, files) == images.make_case(1, 5, files)
    assert images.make_case(1, 5, files) != images.make_case(2, 5, files)
