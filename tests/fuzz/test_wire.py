"""The fuzzer of the wire for a short while."""

import os

import pytest

from tests.fuzz import wire

SECONDS = 0.4 * float(os.environ.get("DDETR_FUZZ_SECONDS", "25"))


def test_no_damaged_request_gets_a_500_or_ends_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    status = wire.main(["--seconds", str(SECONDS), "--seed", "1"])
    said = capsys.readouterr().out
    assert status == 0, said
    assert int(said.split()[0]) > 5 * SECONDS, said


def test_a_case_follows_from_its_seed_and_number() -> None:
    requests = wire.seeds()
    assert wire.make_case(1, 5, requests) == wire.make_case(1, 5, requests)
    assert wire.make_case(1, 5, requests) != wire.make_case(2, 5, requests)
