"""A long command in steps: each says how it goes, and one that is finished is not done again for the same inputs."""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bundle.reader import sha256_of

Say = Callable[[str], None]
Result = dict[str, Any]


class Occupied(RuntimeError):
    """Another process is at work in the folder."""


class Steps:
    """The steps of one command, their results and files kept in a folder.

    A step's record is written when its files are whole, by a rename: after a break it is there or it is not.
    """

    def __init__(self, folder: Path, names: Sequence[str], say: Say) -> None:
        self.folder, self._names, self._say = folder, tuple(names), say
        self._record = folder / "steps.json"
        try:
            done = json.loads(self._record.read_bytes())
            self._done: dict[str, Any] = done if isinstance(done, dict) else {}
        except (FileNotFoundError, ValueError):
            self._done = {}

    def __call__(
        self,
        name: str,
        inputs: Mapping[str, Any],
        work: Callable[[], Result],
        files: Sequence[str] = (),
        *,
        of: str = "",
        always: bool = False,
    ) -> Result:
        """The result of `work`, which leaves `files` in the folder; kept where inputs and files are as they were.

        A result is what JSON can hold; its "line", if it has one, is said. of: what the step is of, where one folder
        keeps several. always: nothing is kept.
        """
        label = f"[{self._names.index(name) + 1}/{len(self._names)}] {name:8}"
        key = digest_of(inputs)
        record = f"{name} {of}".strip()
        kept = None if always else self._done.get(record)
        if kept and kept["key"] == key and self._are_whole(kept["files"]):
            self._say(f"{label}   kept   {kept['result'].get('line', '')}".rstrip())
            return dict(kept["result"])
        self._say(f"{label} ...")
        started = time.perf_counter()
        result = work()
        self._say(f"{label} {time.perf_counter() - started:6.1f} s {result.get('line', '')}".rstrip())
        hashes = {file: sha256_of(self.folder / file) for file in files}
        self._done[record] = {"key": key, "result": result, "files": hashes}
        replace_file(self._record, json.dumps(self._done, indent=1).encode())
        return result

    def detail(self, line: str) -> None:
        """Say a line that belongs to the step under way."""
        self._say(f"                 {line}")

    def _are_whole(self, files: Mapping[str, str]) -> bool:
        return all((self.folder / f).is_file() and sha256_of(self.folder / f) == digest for f, digest in files.items())


def digest_of(inputs: Mapping[str, Any]) -> str:
    """One hash of all that a step depends on."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """Write beside, then rename: at no moment is there a part of it under its name."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        fresh.write_bytes(content)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder, made where there is none. Raises Occupied while another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Occupied(f"another build is at work in {folder}: wait for it, or give another --work") from error
        yield
