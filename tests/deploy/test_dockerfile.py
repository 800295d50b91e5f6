"""The Dockerfile and what goes into it: its stages, its context, its health check, and the script that tries it."""

import http.server
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

import pytest

from deploy.docker import build_and_try, healthy

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "deploy" / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOT_IN_IMAGES = {"deploy"}  # runs beside them


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, with lines that go on joined, less comments."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in joined.splitlines()]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Name of each stage, and its instructions from FROM on."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            name = rest.split()[-1]
            found[name] = []
        if name:
            found[name].append((word, rest))
    return found


STAGES = stages()


def last(stage: str, word: str) -> str:
    return next(rest for each, rest in reversed(STAGES[stage]) if each == word)


def test_bases_are_arguments_or_stages_from_before() -> None:
    seen: set[str] = set()
    for name, lines in STAGES.items():
        base = lines[0][1].split()[0]
        assert base in {"${BASE}", "${GPU_BASE}"} | seen
        for word, rest in lines:
            if word == "COPY" and (source := re.search(r"--from=(\S+)", rest)):
                assert source[1] in seen
        seen.add(name)
    assert {"cpu", "gpu", "export"} <= seen


def ignored(path: str) -> bool:
    """By .dockerignore: the last line that matches the path, or a folder of it, decides."""
    parts = Path(path).parts
    prefixes = ["/".join(parts[: length + 1]) for length in range(len(parts))]
    outcome = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            names = [pattern, pattern.removeprefix("**/")] if pattern.startswith("**/") else [pattern]
            if any(fnmatch(prefix, name) for prefix in prefixes for name in names):
                outcome = not line.startswith("!")
    return outcome


def test_what_is_copied_is_in_the_context() -> None:
    for name, lines in STAGES.items():
        for word, rest in lines:
            if word == "COPY" and "--from" not in rest:
                for source in rest.split()[:-1]:
                    assert (ROOT / source).exists(), f"{name}: COPY {source}"
                    assert source in {".", "deploy/docker/"} or not ignored(source), f"{name}: COPY {source}"


def test_the_context_has_every_package_and_nothing_that_is_built_or_secret() -> None:
    packages = {name.rstrip("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    for package in {name.partition(".")[0] for name in packages} - NOT_IN_IMAGES:
        assert not ignored(f"{package}/__init__.py"), f".dockerignore keeps {package} out"
    for wanted in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "models/blood-cells/model.onnx"):
        assert not ignored(wanted), wanted
    for path in (".git/config", ".env", ".venv/bin/python", "plugins/built/libmsda_cpu.so", "tests/conftest.py"):
        assert ignored(path), path
    assert ignored("server/__pycache__/app.cpython-311.pyc")
    assert ignored("models/blood-cells/model.safetensors"), "15 MB that serving does not need"


@pytest.mark.parametrize("stage", ["cpu", "gpu"], ids="the {}".format)  # "gpu" alone is a marker
def test_what_serves_is_nobody_and_tells_its_health(stage: str) -> None:
    assert last(stage, "USER") == f"{build_and_try.USER}:{build_and_try.USER}", "by number: Kubernetes asks for one"
    health = last(stage, "HEALTHCHECK")
    command = json.loads(health[health.index("CMD ") + 4 :])
    assert command == list(build_and_try.HEALTH)
    assert json.loads(last(stage, "ENTRYPOINT")) == ["ddetr"], "no shell: signals reach the server"
    assert json.loads(last(stage, "CMD")) == ["serve"]
    assert "DDETR_HOST=0.0.0.0" in last(stage, "ENV")


@pytest.mark.parametrize("stage", ["cpu", "gpu"], ids="the {}".format)  # "gpu" alone is a marker
def test_what_serves_is_copied_from_where_it_was_built(stage: str) -> None:
    lines = [rest for word, rest in STAGES[stage] if word == "RUN"]
    assert not [line for line in lines if "pip" in line]
    assert last(stage, "COPY") == f"--from={stage}-build /opt/ddetr/ /opt/ddetr/"


def test_no_index_of_packages_and_no_secret_is_written_down() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert "index-url" not in text
    for _, rest in instructions():
        if "pip install" in rest or "/pip --python" in rest:
            assert "--mount=type=secret,id=pip.conf" in rest or "--no-index" in rest or "pip wheel" in rest


# --- the health check ---


@pytest.fixture
def answering() -> Iterator[http.server.HTTPServer]:
    """A server whose /readyz answers `status`, and whose /livez always answers 200."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            self.send_response(200 if self.path == "/livez" else self.server.status)  # type: ignore[attr-defined]
            self.end_headers()
            self.wfile.write(b'{"status": "..."}')

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.status = 200  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("status", "word", "left"), [(200, None, 0), (503, None, 1), (503, "livez", 0)])
def test_healthy_is_what_the_server_says(
    answering: http.server.HTTPServer, status: int, word: str | None, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering.status = status  # type: ignore[attr-defined]
    monkeypatch.setenv("DDETR_PORT", str(answering.server_port))
    monkeypatch.setattr(sys, "argv", ["healthy.py", *([word] if word else [])])
    assert healthy.main() == left


def test_nobody_there_is_not_healthy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DDETR_PORT", "1")
    monkeypatch.setattr(sys, "argv", ["healthy.py"])
    assert healthy.main() == 1
    assert "on port 1:" in capsys.readouterr().out


# --- the steps of the build ---


def requirements(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DOCKER / "requirements.py", *arguments],
        input=(ROOT / "pyproject.toml").read_text(encoding="utf-8"),
        capture_output=True,
        text=True,
        check=False,
    )


def test_requirements_are_those_of_pyproject() -> None:
    assert requirements().stdout.splitlines() == PROJECT["project"]["dependencies"]
    on_gpu = requirements("--extra", "gpu", "--without", "onnxruntime").stdout.splitlines()
    names = [re.split(r"[<>=]", line)[0] for line in on_gpu]
    assert "onnxruntime-gpu" in names
    assert "onnxruntime" not in names
    assert "torch" not in names


def test_an_unknown_extra_is_named() -> None:
    done = requirements("--extra", "tpu")
    assert done.returncode == 2
    assert "has no extra tpu" in done.stderr


@pytest.mark.parametrize(
    ("has", "what", "installs"),
    [
        ({"python3": 0, "c++": 0}, "build", None),
        ({"python3": 0}, "run", None),
        ({"python3": 0}, "build", "g++"),
        ({"python3": 1, "c++": 0}, "build", "python3 python3-venv"),
    ],
    ids=["all there", "nothing to compile", "no compiler", "no python"],
)
def test_debian_gives_what_the_base_lacks(tmp_path: Path, has: dict[str, int], what: str, installs: str | None) -> None:
    def command(name: str, lines: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    log = tmp_path / "log"
    for name, status in has.items():
        command(name, f"test -e {tmp_path}/installed && exit 0; exit {status}")
    command("apt-get", f'echo "$*" >> {log}; case "$*" in *install*) touch {tmp_path}/installed;; esac')
    command("rm", "exit 0")
    (tmp_path / "touch").symlink_to(str(shutil.which("touch")))
    done = subprocess.run(
        [str(shutil.which("sh")), DOCKER / "system.sh", what],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    wanted = [line for line in lines if "install" in line]
    if installs is None:
        assert not wanted
    else:
        assert wanted == [f"install -qq -y --no-install-recommends {installs}"]


def test_a_base_whose_python_is_too_old_is_told(tmp_path: Path) -> None:
    for name in ("python3", "apt-get", "rm"):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {int(name == 'python3')}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [str(shutil.which("sh")), DOCKER / "system.sh", "run"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "needs Python 3.11" in done.stderr


# --- the script that tries an image ---


class Pretended(build_and_try.Tool):
    """Runs no container: this server is what it has started."""

    def __init__(self, server: http.server.HTTPServer, inside: dict[str, object], leaves: int = 0) -> None:
        self.command = ["true"]
        self.port = server.server_port
        self.inside = inside
        self.leaves = leaves
        self.has_ended = False
        self.closed = False

    def build(self, arguments: object, image: str) -> None:
        pass

    def import_root(self, folder: Path) -> None:
        raise AssertionError("not asked for")

    def size_bytes(self, image: str) -> int:
        return 405_000_000

    def once(self, image: str, command: Sequence[str], mount: object = None) -> str:
        return json.dumps(self.inside)

    def start(self, image: str) -> None:
        pass

    def ended(self) -> bool:
        return self.has_ended

    def healthy(self, image: str) -> str:
        return "/readyz 200"

    def stop(self) -> int:
        return self.leaves

    def log(self) -> str:
        return "cannot start: the bundle is missing"

    def close(self) -> None:
        self.closed = True


GUARDED: dict[str, object] = {
    "user": build_and_try.USER,
    "writes": [],
    "tmp": True,
    "compilers": [],
    "packages": [],
    "capabilities": "0000000000000000",
    "native": ["libmsda_onnxruntime.so", "libresize.so"],
}


@pytest.fixture
def detecting(answering: http.server.HTTPServer) -> http.server.HTTPServer:
    """It finds one cell in whatever is posted."""

    def do_get(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(handler.server.status if handler.path == "/readyz" else 200)  # type: ignore[attr-defined]
        handler.end_headers()
        handler.wfile.write(b'{"engine": "fake"}')

    def do_post(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b'{"images": [{"detections": [{"label": "RBC"}]}]}')

    handler = type("Detecting", (answering.RequestHandlerClass,), {"do_GET": do_get, "do_POST": do_post})
    answering.RequestHandlerClass = handler  # type: ignore[misc]
    return answering


def test_the_try_tells_size_and_times(
    detecting: http.server.HTTPServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = Pretended(detecting, GUARDED)
    report = tmp_path / "report.json"
    assert build_and_try.main(["--json", str(report)], tools=lambda _: tool) == 0
    told = json.loads(report.read_text(encoding="utf-8"))
    assert told["image, MB uncompressed"] == "405"
    assert float(told["start to first answer of /detect, s"]) >= float(told["start to ready, s"])
    assert told["first answer"].startswith("1 boxes")
    assert "engine" in capsys.readouterr().out
    assert tool.closed


@pytest.mark.parametrize(
    "wrong",
    [{"user": 0}, {"writes": ["/etc/probe"]}, {"compilers": ["gcc"]}, {"packages": ["torch"]}, {"tmp": False}],
    ids=str,
)
def test_an_image_that_is_not_as_promised_fails(
    detecting: http.server.HTTPServer, wrong: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    tool = Pretended(detecting, GUARDED | wrong)
    assert build_and_try.main([], tools=lambda _: tool) == 1
    assert str(next(iter(wrong))) in capsys.readouterr().err
    assert tool.closed


def test_a_server_that_ends_is_told_with_its_last_lines(
    detecting: http.server.HTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    detecting.status = 503  # type: ignore[attr-defined]
    tool = Pretended(detecting, GUARDED)
    tool.has_ended = True
    assert build_and_try.main([], tools=lambda _: tool) == 1
    assert "the bundle is missing" in capsys.readouterr().err


def test_a_stop_that_is_not_clean_fails(detecting: http.server.HTTPServer, capsys: pytest.CaptureFixture[str]) -> None:
    tool = Pretended(detecting, GUARDED, leaves=137)
    assert build_and_try.main([], tools=lambda _: tool) == 1
    assert "exit status 137" in capsys.readouterr().err


def test_no_tool_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    assert build_and_try.main([]) == 1
    assert "none of docker, podman and buildah works" in capsys.readouterr().err
