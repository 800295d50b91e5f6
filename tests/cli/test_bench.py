from __future__ import annotations

import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from cli.bench import TERMINATED, argument_parser, plan, split_at_dashes
from cli.main import main
from loadtest.client import Target
from loadtest.errors import ServerNotReady
from loadtest.payload import Payload
from loadtest.report import Measurement, Plan, Report, Server
from tests.loadtest.made import SERVER, measurement
from tests.server.tiny_bundle import write_tiny_bundle

ROOT = Path(__file__).parents[2]


class StandIn:
    """In the place of a server and of the load on it."""

    def __init__(self) -> None:
        self.served: list[tuple[Target | None, Sequence[str], dict[str, str], str | None]] = []
        self.plans: list[Plan] = []
        self.payloads: Sequence[Payload] = ()
        self.valid = True
        self.latencies_ms = [float(value) for value in range(20, 80)]

    @contextmanager
    def server_to_test(
        self, target: Target | None, flags: Sequence[str], settings: dict[str, str], api_key: str | None
    ) -> Iterator[tuple[Target, Server]]:
        self.served.append((target, list(flags), settings, api_key))
        yield target or Target("http://127.0.0.1:1", api_key), SERVER

    def measure(self, target: Target, payloads: Sequence[Payload], load: Plan) -> Measurement:
        self.plans.append(load)
        self.payloads = payloads
        holds = load.rate_rps is None or load.rate_rps < 10
        return measurement(
            self.latencies_ms,
            valid=self.valid,
            within_target=None if load.target_ms is None else float(holds),
            throughput_rps=40.0,
            **load.model_dump(),
        )


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr("loadtest.session.server_to_test", made.server_to_test)
    monkeypatch.setattr("loadtest.session.measure", made.measure)
    monkeypatch.setattr("loadtest.payload.draw_smear", flat)
    return made


def flat(seed: int, height: int, width: int) -> object:
    class Flat:
        image = __import__("numpy").full((height, width, 3), seed, "uint8")

    return Flat()


def refused(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        main(["bench", *argv])
    assert left.value.code == 2
    return capsys.readouterr().err


def test_alone_it_serves_the_embedded_model_and_loads_it_twice(
    stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench"]) == 0
    [(target, flags, settings, key)] = stand_in.served
    assert (target, flags, key) == (None, [], None)
    assert settings["bundle"].endswith("blood-cells")
    assert settings["max_batch_size"] == "4"
    saturating, comfortable = stand_in.plans
    assert (saturating.concurrency, saturating.duration_s, saturating.warmup_s) == (32, 8.0, 3.0)
    assert (comfortable.rate_rps, comfortable.duration_s, comfortable.connections) == (28.0, 20.0, 256)
    text = capsys.readouterr().out
    assert "bright 7" in text
    assert "16 drawn smears, JPEG 640x480" in text


def test_the_load_is_as_asked(stand_in: StandIn) -> None:
    argv = (
        "bench --rate 50 --duration 7 --warmup 0 --connections 9 --seed 3 --timeout-ms 250 --priority batch --retry 2"
    )
    assert main(argv.split()) == 0
    assert stand_in.plans == [
        Plan(
            rate_rps=50.0,
            duration_s=7.0,
            warmup_s=0.0,
            seed=3,
            connections=9,
            timeout_ms=250.0,
            priority="batch",
            retries=2,
        )
    ]


def test_a_running_server_is_tested_where_it_is(stand_in: StandIn, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\nand more\n", encoding="utf-8")
    argv = "bench --concurrency 5 --url http://gpu-host:8000/ --metrics-url http://gpu-host:9000/metrics --api-key-file"
    assert main([*argv.split(), str(tmp_path / "key")]) == 0
    [(target, _, settings, key)] = stand_in.served
    assert target == Target("http://gpu-host:8000", "secret", "http://gpu-host:9000/metrics")
    assert (settings, key) == ({}, "secret")
    assert [load.concurrency for load in stand_in.plans] == [5]


def test_flags_after_dashes_are_the_server_s(stand_in: StandIn) -> None:
    argv = ["bench", "--rate", "5", "--bundle", "models/other", "--", "--max-batch-size", "8", "--api-keys", "one,two"]
    assert main(argv) == 0
    [(_, flags, settings, key)] = stand_in.served
    assert flags == ["--bundle", "models/other", "--max-batch-size", "8", "--api-keys", "one,two"]
    assert (settings["max_batch_size"], settings["bundle"]) == ("8", "models/other")
    assert key == "one", "its own server's key need not be told twice"
    assert "one" not in settings.values()


@pytest.mark.parametrize("keys", [["--api-keys", "one,two"], ["--api-keys=one,two"]])
def test_keys_are_in_no_report(keys: list[str], stand_in: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert main(["bench", "--rate", "5", "--json", str(path), "--", *keys]) == 0
    assert "one,two" not in path.read_text(encoding="utf-8")
    assert Report.model_validate_json(path.read_bytes()).command[:2] == ("--rate", "5")


def test_a_folder_s_pictures_are_sent(stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jpg").write_bytes(bytes(2000))
    assert main(["bench", "--rate", "5", "--data", str(tmp_path)]) == 0
    assert [payload.body for payload in stand_in.payloads] == [bytes(2000)]
    assert f"1 pictures of {tmp_path}, 2 kB each" in capsys.readouterr().out


def test_the_report_is_written_with_its_plot(stand_in: StandIn, tmp_path: Path) -> None:
    path, picture = tmp_path / "report.json", tmp_path / "report.png"
    assert main(["bench", "--rate", "5", "--json", str(path), "--plot", str(picture)]) == 0
    report = Report.model_validate_json(path.read_bytes())
    assert (report.kind, report.schema_version) == ("open loop", 1)
    assert [measured.plan.rate_rps for measured in report.measurements] == [5]
    assert report.server == SERVER
    assert report.host.cores >= 1
    with Image.open(picture) as plotted:
        assert plotted.format == "PNG"


def test_a_search_reports_its_steps(stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    assert main(["bench", "--find-rate", "--p99-ms", "100", "--json", str(path)]) == 0
    report = Report.model_validate_json(path.read_bytes())
    assert report.kind == "rate search"
    assert report.search is not None
    assert report.search.rate_rps == pytest.approx(10, rel=0.05)
    assert len(report.search.steps) == len(report.measurements)
    assert {load.target_ms for load in stand_in.plans} == {100.0}
    assert "requests a second with p99 within 100 ms" in capsys.readouterr().out


def test_figures_that_are_the_generator_s_end_with_1(stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in.valid = False
    assert main(["bench", "--rate", "5"]) == 1
    assert "NOT VALID" in capsys.readouterr().out


def test_nothing_answered_ends_with_1(stand_in: StandIn) -> None:
    stand_in.latencies_ms = []
    assert main(["bench", "--rate", "5"]) == 1


def test_a_server_that_cannot_be_tested_is_one_line(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def not_ready(*_: object) -> None:
        raise ServerNotReady("http://h/readyz: no answer: refused")

    monkeypatch.setattr("loadtest.session.server_to_test", not_ready)
    assert main(["bench", "--url", "http://h"]) == 1
    assert capsys.readouterr().err == "ddetr bench: http://h/readyz: no answer: refused\n"


@pytest.mark.parametrize(
    ("argv", "library"), [(["--rate", "5"], "aiohttp"), (["--rate", "5", "--plot", "p.png"], "matplotlib")]
)
def test_a_missing_extra_is_one_line_with_the_way_out(
    argv: list[str], library: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else there(name))
    assert main(["bench", *argv]) == 2
    assert capsys.readouterr().err == (
        f"ddetr bench needs the bench extra: {sys.executable} -m pip install 'ddetr[bench]' "
        f"({library} is not installed)\n"
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--url", "host:8000"], "--url: 'host:8000' does not begin with http://"),
        (["--url", "http://h", "--tune"], "--tune for a server started here"),
        (["--url", "http://h", "--bundle", "b"], "--bundle for a server started here"),
        (["--url", "http://h", "--", "--device", "cpu"], "flags after -- for a server started here"),
        (["--rate", "5", "--find-rate"], "not allowed with"),
        (["--rate", "0"], "0 is not a number above 0"),
        (["--rate", "nan"], "nan is not a number above 0"),
        (["--warmup", "-1"], "-1 is not a number, 0 or more"),
        (["--concurrency", "0"], "0 is not a whole number above 0"),
        (["--p99-ms", "100"], "--p99-ms is the target of --find-rate or --tune"),
        (["--find-rate", "--start-rate", "9", "--max-rate", "8"], "--start-rate 9 exceeds --max-rate 8"),
        (["--", "--port", "80"], "--port after --: bench sets it"),
        (["--", "--port=80"], "--port after --: bench sets it"),
        (["--tune", "--", "--max-batch-size", "8"], "--max-batch-size after --: bench sets it"),
        (["--", "--max-batch-size", "none"], "'none'"),
        (["--json", "absent/report.json"], "--json: there is no folder"),
        (["--api-key-file", "absent"], "--api-key-file: absent: No such file"),
        (["--rat", "5"], "unrecognized arguments"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(
    argv: list[str], said: str, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(argv, capsys)
    assert not stand_in.served


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == Report.model_json_schema()


def test_arguments_are_split_at_the_first_dashes() -> None:
    assert split_at_dashes(["a", "--", "b", "--", "c"]) == (["a"], ["b", "--", "c"])
    assert split_at_dashes(["a"]) == (["a"], [])


def test_durations_have_their_defaults_by_kind() -> None:
    arguments = argument_parser().parse_args(["--rate", "5"])
    assert plan(arguments, 20.0, None).duration_s == 20
    assert plan(argument_parser().parse_args(["--duration", "2.5"]), 20.0, None).duration_s == 2.5


def test_when_it_is_ended_its_server_ends_too(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny").path
    command = [sys.executable, "-m", "cli.main", "bench", "--bundle", str(bundle), "--rate", "5", "--duration", "600"]
    with subprocess.Popen([*command, "--", "--device", "cpu"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = ""
        while "open loop" not in seen:
            seen += process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == TERMINATED
    found = re.search(r"http://127\.0\.0\.1:(\d+)", seen)
    assert found is not None
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(found[1]))).close()
