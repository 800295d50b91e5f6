"""Build an image of this repository's Dockerfile, run it as it is meant to run, and ask it for boxes.

    python deploy/docker/build_and_try.py                                   # the target cpu
    python deploy/docker/build_and_try.py --target gpu --run-arg=--gpus=all # on a GPU host
    python deploy/docker/build_and_try.py --target export --checkpoint FILE --try-args='--flavour rtx --targets sm86'
    python deploy/docker/build_and_try.py --rootfs DIR    # DIR by: debootstrap --variant=minbase bookworm DIR

With docker, podman or buildah, whichever works. It runs with a read-only root, no capabilities, no new privileges and
as nobody: docker and podman see to that, and with buildah a namespace whose root is the image (as root, by unshare,
mount and setpriv). It prints a table of what was found; exit status 1 if anything is not as promised. Standard library.
"""

import argparse
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
USER = 65532  # of the images
STOP_S = 40  # longer than drain_timeout_ms
LONGEST_START_S = 600.0
HEALTH = ("python3", "-IS", "/opt/ddetr/bin/healthy.py")
BASE_IMAGE = "localhost/ddetr-base:rootfs"

# Runs inside; prints what it found as JSON.
LOOK_INSIDE = """
import importlib.util, json, os, shutil
def writes(path):
    try:
        open(path, "w").close(); os.remove(path)
    except OSError:
        return False
    return True
print(json.dumps({
    "user": os.getuid(),
    "writes": [p for p in ("/probe", "/opt/ddetr/probe", "/etc/probe") if writes(p)],
    "tmp": writes("/tmp/probe"),
    "compilers": [c for c in ("cc", "c++", "gcc", "g++", "clang", "nvcc", "make") if shutil.which(c)],
    "packages": [p for p in ("torch", "onnx", "pip", "setuptools") if importlib.util.find_spec(p)],
    "capabilities": [l.split()[1] for l in open("/proc/self/status") if l.startswith("CapBnd")][0],
    "native": sorted(os.listdir(os.path.join(importlib.util.find_spec("plugins").submodule_search_locations[0],
                                             "built"))),
}))
"""


class Failed(Exception):
    """Something is not as promised; the message is for the person at the terminal."""


def run(command: Sequence[str], **options: object) -> str:
    """The command's standard output, stripped. Raises Failed with its last lines of standard error."""
    done = subprocess.run(list(command), capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
        raise Failed(f"{shlex.join(map(str, command[:6]))} ...: exit status {done.returncode}\n{tail}")
    return str(done.stdout).strip()


class Tool(ABC):
    """What builds an image and runs it. `command` is its name and global flags."""

    def __init__(self, command: Sequence[str], arguments: argparse.Namespace) -> None:
        self.command = list(command)
        self.run_args: list[str] = arguments.run_arg
        self.environment = ["DDETR_HOST=127.0.0.1", f"DDETR_PORT={arguments.port}", *arguments.env]
        self.port: int = arguments.port

    def build(self, arguments: argparse.Namespace, image: str) -> None:
        """Build the target; the tool's own lines go to standard error."""
        command = [*self.command, self.verb, "--target", arguments.target, "--tag", image]
        for name, value in (("BASE", arguments.base), ("GPU_BASE", arguments.gpu_base)):
            command += ["--build-arg", f"{name}={value}"] if value else []
        for each in arguments.build_arg:
            command += ["--build-arg", each]
        for name, path in (("pip.conf", arguments.pip_conf), ("ca.crt", arguments.ca)):
            command += ["--secret", f"id={name},src={path}"] if path else []
        command += [*self.build_flags, *arguments.build_flag, str(arguments.context)]
        done = subprocess.run(command, stdout=sys.stderr, check=False)
        if done.returncode:
            raise Failed(f"the build ended with exit status {done.returncode}: see its lines above")

    verb = "build"
    build_flags: tuple[str, ...] = ()

    @abstractmethod
    def import_root(self, folder: Path) -> None:
        """Make the folder, a whole root file system, the image BASE_IMAGE."""

    @abstractmethod
    def size_bytes(self, image: str) -> int:
        """The image's files, uncompressed."""

    @abstractmethod
    def once(self, image: str, command: Sequence[str], mount: tuple[Path, str] | None = None) -> str:
        """Run a command in a new container; its standard output. `mount` is a writable folder and where it goes."""

    @abstractmethod
    def start(self, image: str) -> None:
        """Start the image's own command, and return at once."""

    @abstractmethod
    def ended(self) -> bool:
        """Whether what was started is not running any more."""

    @abstractmethod
    def healthy(self, image: str) -> str:
        """What the image's health check prints beside the server that runs. Raises Failed where it is not healthy."""

    @abstractmethod
    def stop(self) -> int:
        """SIGTERM; the exit status."""

    @abstractmethod
    def log(self) -> str:
        """What it has written."""

    @abstractmethod
    def close(self) -> None:
        """Leave nothing running."""


class Engine(Tool):
    """docker and podman."""

    def __init__(self, command: Sequence[str], arguments: argparse.Namespace) -> None:
        super().__init__(command, arguments)
        self.name = f"ddetr-try-{uuid.uuid4().hex[:8]}"
        if "podman" in Path(command[0]).name:
            self.build_flags = ("--format", "docker")  # OCI's format knows no HEALTHCHECK

    GUARDS = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "all", "--security-opt", "no-new-privileges")

    def import_root(self, folder: Path) -> None:
        """By a tar."""
        packing = subprocess.Popen(["tar", "-C", str(folder), "-c", "."], stdout=subprocess.PIPE)
        run([*self.command, "import", "-", BASE_IMAGE], stdin=packing.stdout)
        if packing.wait():
            raise Failed(f"tar could not pack {folder}")

    def size_bytes(self, image: str) -> int:
        """As the tool counts."""
        return int(run([*self.command, "image", "inspect", image, "--format", "{{.Size}}"]))

    def once(self, image: str, command: Sequence[str], mount: tuple[Path, str] | None = None) -> str:
        """`run --rm`."""
        volume = ["--volume", f"{mount[0]}:{mount[1]}"] if mount else []
        flags = [*self.GUARDS, *self.run_args, *volume, "--entrypoint", command[0]]
        return run([*self.command, "run", "--rm", *flags, image, *command[1:]])

    def start(self, image: str) -> None:
        """`run --detach`, on the host's network: the server listens on loopback."""
        environment = [word for each in self.environment for word in ("--env", each)]
        flags = ["--detach", "--name", self.name, "--network", "host", *self.GUARDS, *environment, *self.run_args]
        run([*self.command, "run", *flags, image])

    def ended(self) -> bool:
        """By its state."""
        return run([*self.command, "inspect", self.name, "--format", "{{.State.Running}}"]) != "true"

    def healthy(self, image: str) -> str:  # noqa: ARG002  # it is running already
        """`exec`."""
        return run([*self.command, "exec", self.name, *HEALTH])

    def stop(self) -> int:
        """`stop`, which waits."""
        run([*self.command, "stop", "--time", str(STOP_S), self.name])
        return int(run([*self.command, "inspect", self.name, "--format", "{{.State.ExitCode}}"]))

    def log(self) -> str:
        """`logs`."""
        done = subprocess.run([*self.command, "logs", self.name], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def close(self) -> None:
        """`rm --force`."""
        subprocess.run([*self.command, "rm", "--force", self.name], capture_output=True, check=False)


# $1 the image's root, $2 a folder to mount ("" for none), $3 where to; then the command.
IN_ITS_ROOT = """
set -eu
root=$1 folder=$2 place=$3; shift 3
mount --bind "$root" "$root"
if [ -n "$folder" ]; then mkdir -p "$root$place"; mount --bind "$folder" "$root$place"; fi
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -o remount,bind,ro "$root"
exec chroot "$root" \
    setpriv --reuid=65532 --regid=65532 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all \
    /usr/bin/env -i "$@"
"""


class Buildah(Tool):
    """buildah, and a chroot in namespaces where it cannot run a container read-only itself."""

    verb = "bud"
    build_flags = ("--format", "docker")

    def __init__(self, command: Sequence[str], arguments: argparse.Namespace) -> None:
        super().__init__(command, arguments)
        self.containers: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.output = tempfile.TemporaryFile()  # noqa: SIM115  # as long as this object

    def import_root(self, folder: Path) -> None:
        """`from scratch`, copied into."""
        container = run([*self.command, "from", "scratch"])
        try:
            run([*self.command, "add", "--quiet", container, str(folder), "/"])
            run([*self.command, "commit", "--quiet", container, BASE_IMAGE])
        finally:
            run([*self.command, "rm", container])

    def size_bytes(self, image: str) -> int:
        """The files' own, added up."""
        return int(run(["du", "-xsb", self._root(image)]).split()[0])

    def once(self, image: str, command: Sequence[str], mount: tuple[Path, str] | None = None) -> str:
        """In a chroot of its own."""
        return run(self._inside(image, command, mount))

    def start(self, image: str) -> None:
        """In a chroot of its own, as a child of this process."""
        command = self._config(image, "Entrypoint") + self._config(image, "Cmd")
        self.process = subprocess.Popen(self._inside(image, command), stdout=self.output, stderr=self.output)

    def ended(self) -> bool:
        """By the child."""
        return self.process is None or self.process.poll() is not None

    def healthy(self, image: str) -> str:
        """In a chroot of its own, on the same network."""
        return self.once(image, HEALTH)

    def stop(self) -> int:
        """To the server itself: unshare forwards no signal."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(children[0]) if children else self.process.pid, signal.SIGTERM)
        return self.process.wait(STOP_S)

    def log(self) -> str:
        """From the file that it writes to."""
        self.output.seek(0)
        return self.output.read().decode(errors="replace")

    def close(self) -> None:
        """End the child, remove the containers."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for container in self.containers:
            subprocess.run([*self.command, "rm", container], capture_output=True, check=False)
        self.containers.clear()

    def _root(self, image: str) -> str:
        container = run([*self.command, "from", image])
        self.containers.append(container)
        return run([*self.command, "mount", container])

    def _config(self, image: str, key: str) -> list[str]:
        told = json.loads(run([*self.command, "inspect", "--type", "image", image]))
        return list(told["Docker"]["config"].get(key) or [])

    def _inside(self, image: str, command: Sequence[str], mount: tuple[Path, str] | None = None) -> list[str]:
        folder, place = mount or ("", "")
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        words = ["sh", "-c", IN_ITS_ROOT, "sh", self._root(image), str(folder), place]
        environment = [*self._config(image, "Env"), *self.environment]
        return [*namespaces, *words, *environment, *command]


def find_tool(arguments: argparse.Namespace) -> Tool:
    """The tool that was asked for, else the first that works."""
    if arguments.tool:
        words = shlex.split(arguments.tool)
        return (Buildah if Path(words[0]).name == "buildah" else Engine)(words, arguments)
    for name in ("docker", "podman", "buildah"):
        if shutil.which(name) and not subprocess.run([name, "info"], capture_output=True, check=False).returncode:
            return (Buildah if name == "buildah" else Engine)([name], arguments)
    raise Failed(
        "none of docker, podman and buildah works here (`docker info` fails); name one: --tool='podman --runtime runc'"
    )


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """One request to the server; status and body. OSError where nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, {"Content-Type": "image/jpeg"} if body else {})
        response = connection.getresponse()
        return response.status, response.read()
    except http.client.HTTPException as error:
        raise OSError(str(error)) from error
    finally:
        connection.close()


def wait_ready(tool: Tool) -> None:
    """Until /readyz says 200. Raises Failed where the container ends first, or takes too long."""
    until = time.monotonic() + LONGEST_START_S
    asked_s = 0.0
    while time.monotonic() < until:
        try:
            if ask(tool.port, "GET", "/readyz")[0] == 200:
                return
        except OSError:
            pass
        if time.monotonic() - asked_s > 1:  # to ask the tool takes longer than to ask the server
            asked_s = time.monotonic()
            if tool.ended():
                raise Failed(f"the server ended before it was ready; its last lines:\n{tool.log()[-3000:]}")
        time.sleep(0.02)
    raise Failed(f"not ready after {LONGEST_START_S:.0f} s; its last lines:\n{tool.log()[-3000:]}")


def try_server(tool: Tool, image: str, target: str, picture: Path | None) -> list[tuple[str, str]]:
    """Start it, ask it, look around inside, stop it; what was found, in words."""
    inside = json.loads(tool.once(image, ["python3", "-c", LOOK_INSIDE]))
    unwanted = inside["packages"] + (inside["compilers"] if target == "cpu" else [])
    if inside["user"] != USER or inside["writes"] or unwanted or not inside["tmp"]:
        raise Failed(
            f"inside: {inside}; a user of its own, a read-only root, a /tmp, no torch, pip or compiler are promised"
        )
    rows = [
        ("user, capabilities", f"{inside['user']}, {int(inside['capabilities'], 16):x}"),
        ("root", "read-only; no torch, pip or compiler" if target == "cpu" else "read-only; no torch or pip"),
        ("native libraries", " ".join(name for name in inside["native"] if name.endswith(".so"))),
    ]
    began_s = time.monotonic()
    tool.start(image)
    wait_ready(tool)
    ready_s = time.monotonic() - began_s
    body = picture.read_bytes() if picture else ask(tool.port, "GET", "/sample.jpg")[1]
    fetched_s = time.monotonic()
    status, answer = ask(tool.port, "POST", "/detect", body)
    answered_s = time.monotonic()
    if status != 200:
        raise Failed(f"POST /detect: {status} {answer[:500]!r}")
    found = json.loads(answer)["images"][0]["detections"]
    if not found and picture is None:
        raise Failed("POST /detect found nothing in the server's own sample")
    health = tool.healthy(image)
    model = json.loads(ask(tool.port, "GET", "/model")[1])
    rows += [
        ("engine", str(model["engine"])),
        ("health check", health),
        ("start to ready, s", f"{ready_s:.2f}"),
        ("start to first answer of /detect, s", f"{ready_s + answered_s - fetched_s:.2f}"),
        ("first answer", f"{len(found)} boxes in {(answered_s - fetched_s) * 1e3:.0f} ms"),
    ]
    began_s = time.monotonic()
    if (left := tool.stop()) != 0:
        raise Failed(f"exit status {left} after SIGTERM; its last lines:\n{tool.log()[-2000:]}")
    rows.append(("SIGTERM to exit 0, s", f"{time.monotonic() - began_s:.2f}"))
    return rows


def try_export(tool: Tool, image: str, checkpoint: Path | None, words: Sequence[str]) -> list[tuple[str, str]]:
    """`ddetr build --help`, or a whole build of the checkpoint."""
    told = tool.once(image, ["ddetr", "build", "--help"])
    if "usage: ddetr build" not in told:
        raise Failed(f"ddetr build --help says {told[:200]!r}")
    if checkpoint is None:
        return [("ddetr build --help", "works; for a whole build name a --checkpoint")]
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary)
        shutil.copy(checkpoint, data)
        data.chmod(0o777)
        command = ["ddetr", "build", "--checkpoint", f"/data/{checkpoint.name}", "--output", "/data/bundle", *words]
        lines = tool.once(image, command, (data, "/data")).splitlines()
        engines = [path.name for path in (data / "bundle").glob("*.engine")]
        if not engines:
            raise Failed(f"no engine in the bundle: {sorted(path.name for path in (data / 'bundle').iterdir())}")
        return [(f"ddetr build {shlex.join(words)}", "\n".join(lines)), ("engines", " ".join(engines))]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", choices=("cpu", "gpu", "export"), default="cpu")
    add("--tool", help="docker, podman or buildah, with global flags if need be (default: the first that works)")
    add("--context", type=Path, default=ROOT, help="the repository (default: this one)")
    add("--image", help="its name (default: localhost/ddetr:TARGET)")
    add("--base", help="the image that cpu stands on (default: the Dockerfile's)")
    add("--gpu-base", help="the image that gpu and export stand on (default: the Dockerfile's)")
    add("--rootfs", type=Path, metavar="DIR", help="take this root file system for both bases that are not named")
    add("--pip-conf", type=Path, metavar="FILE", help="pip's configuration while building; stays out of the image")
    add("--ca", type=Path, metavar="FILE", help="a certificate that it names as /run/secrets/ca.crt")
    add("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    add(
        "--build-flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="for the tool's build: --build-flag=--no-cache",
    )
    add(
        "--run-arg",
        action="append",
        default=[],
        metavar="FLAG",
        help="for docker's or podman's run: --run-arg=--gpus=all",
    )
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="for the server: --env=DDETR_DEVICE=cpu")
    add("--port", type=int, default=0, help="for the server to listen on, loopback only (default: a free one)")
    add("--picture", type=Path, help="to ask for boxes in (default: the sample that the server shows)")
    add("--checkpoint", type=Path, metavar="FILE", help="for export: build a bundle of it")
    add("--try-args", type=shlex.split, default=[], metavar="WORDS", help="for export: more arguments of `ddetr build`")
    add("--no-build", action="store_true", help="the image is there already")
    add("--json", type=Path, metavar="FILE", help="write what was found there, too")
    arguments = parser.parse_args(argv)
    if bad := [each for each in arguments.build_arg + arguments.env if not re.match(r"\w+=", each)]:
        parser.error(f"not NAME=VALUE: {bad[0]!r}")
    if not arguments.port:
        with socket.create_server(("127.0.0.1", 0)) as free:
            arguments.port = free.getsockname()[1]
    return arguments


def main(argv: Sequence[str] | None = None, tools: Callable[[argparse.Namespace], Tool] = find_tool) -> int:
    """Build, try, tell."""
    arguments = parse(argv)
    image = arguments.image or f"localhost/ddetr:{arguments.target}"
    tool = None
    try:
        tool = tools(arguments)
        rows = [("tool", run([*tool.command, "--version"]))]
        if not arguments.no_build:
            if arguments.rootfs:
                tool.import_root(arguments.rootfs)
                arguments.base = arguments.base or BASE_IMAGE
                arguments.gpu_base = arguments.gpu_base or BASE_IMAGE
            began_s = time.monotonic()
            tool.build(arguments, image)
            rows.append(("build, s", f"{time.monotonic() - began_s:.0f}"))
        rows.append(("image, MB uncompressed", f"{tool.size_bytes(image) / 1e6:.0f}"))
        if arguments.target == "export":
            rows += try_export(tool, image, arguments.checkpoint, arguments.try_args)
        else:
            rows += try_server(tool, image, arguments.target, arguments.picture)
    except (Failed, OSError, subprocess.TimeoutExpired) as error:
        print(f"build_and_try: {error}", file=sys.stderr)
        return 1
    finally:
        if tool is not None:
            tool.close()
    for name, value in rows:
        print(f"{name:<40} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(dict(rows), indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
