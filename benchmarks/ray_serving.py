"""The Serve application on a Ray of its own, on this machine's loopback, for as long as a `with` lasts."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loadtest.errors import ServerNotStarted
from loadtest.server_process import free_port, stop, tail, wait_until_ready

ROOT = Path(__file__).parents[1]

_HEAD = """
import ray, sys
context = ray.init(_node_ip_address="127.0.0.1", num_cpus=float(sys.argv[1]), include_dashboard=False)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


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
    """`serve run` with this configuration on a new Ray of so many CPUs, until it is left. Raises ServerNotStarted."""
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
                raise ServerNotStarted(f"Ray did not start:\n{tail(log)}")
            serve = subprocess.Popen(
                [sys.executable, "-m", "ray.serve.scripts", "run", file.name],
                cwd=ROOT,
                env={**variables, "RAY_ADDRESS": address},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, serve, log)
            yield RayServing(url, (head.pid, serve.pid))
        finally:
            if serve is not None:
                stop(serve)
            stop(head)
            for stream in (head.stdin, head.stdout):
                if stream is not None:
                    stream.close()
