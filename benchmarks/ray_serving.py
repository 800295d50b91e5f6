"""The Serve application on a Ray of its own, on this machine's loopback, for as long as a `with` lasts."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 240.0
_STOP_TIMEOUT_S = 60.0
_LOG_LINES = 40
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

_HEAD = """
import ray, sys
context = ray.init(_node_ip_address="127.0.0.1", num_cpus=float(sys.argv[1]), include_dashboard=False)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


class ServeNotStarted(Exception):
    """The application did not get ready; the message has the end of its log."""


@dataclass(frozen=True)
class RayServing:
    """An application that is ready."""

    url: str
    pids: tuple[int, int]  # of the head, with everything of this Ray below it, and of `serve run`


def ray_environment() -> dict[str, str]:
    """For a Ray of one's own: it asks and tells nobody outside."""
    return {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",  # else a token is written into the home folder
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def configuration(port: int, settings: Mapping[str, Any], replicas: int, cpus: float) -> dict[str, Any]:
    """As deploy/ray/cpu.yaml, with a fixed number of replicas."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": port},
        "logging_config": {"enable_access_log": False},
        "applications": [
            {
                "name": "ddetr",
                "route_prefix": "/",
                "import_path": "deploy.ray.application:build",
                "args": {"log_level": "warning", **settings},
                "deployments": [
                    {"name": "Detector", "num_replicas": replicas, "ray_actor_options": {"num_cpus": cpus}}
                ],
            }
        ],
    }


def haproxy_environment(folder: str) -> dict[str, str]:
    """Of a Ray whose proxy is HAProxy, with files and ports that no other has."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    }


@contextmanager
def ray_serving(content: Mapping[str, Any], cpus: float, through_haproxy: bool = False) -> Iterator[RayServing]:
    """`serve run` with this configuration on a new Ray of so many CPUs, until it is left. Raises ServeNotStarted."""
    port = content["http_options"]["port"]
    with (
        tempfile.NamedTemporaryFile("w", suffix=".yaml") as file,
        tempfile.TemporaryFile() as log,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
    ):
        variables = ray_environment() | (haproxy_environment(folder) if through_haproxy else {})
        yaml.safe_dump(dict(content), file)
        file.flush()
        head = subprocess.Popen(
            [sys.executable, "-c", _HEAD, str(cpus)],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert head.stdout is not None
        serve: subprocess.Popen[bytes] | None = None
        try:
            address = head.stdout.readline().strip()
            if not address:
                raise ServeNotStarted(f"Ray did not start:\n{_tail(log)}")
            serve = subprocess.Popen(
                [sys.executable, "-m", "ray.serve.scripts", "run", file.name],
                cwd=ROOT,
                env={**variables, "RAY_ADDRESS": address},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url, serve, log)
            yield RayServing(url, (head.pid, serve.pid))
        finally:
            if serve is not None:
                _end(serve)
            _end(head)
            for stream in (head.stdin, head.stdout):
                if stream is not None:
                    stream.close()


def _wait_until_ready(url: str, serve: "subprocess.Popen[bytes]", log: IO[bytes]) -> None:
    until_s = time.monotonic() + START_TIMEOUT_S
    while not _ready(url):
        if serve.poll() is not None or time.monotonic() > until_s:
            raise ServeNotStarted(f"the application is not ready:\n{_tail(log)}")
        time.sleep(0.2)


def _ready(url: str) -> bool:
    try:
        with _OPENER.open(f"{url}/readyz", timeout=5) as response:
            return b'"ok"' in response.read()
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except OSError:
        return False


def _end(process: "subprocess.Popen[Any]") -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return "\n".join(log.read().decode("utf-8", "replace").splitlines()[-_LOG_LINES:])
