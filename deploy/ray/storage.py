"""Files in a folder or an object store, by URI; a file appears whole or not at all."""

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

_APPEARS_WHEN_CLOSED = {"s3", "gcs", "abfs"}
"""Object stores: an upload that is broken off leaves nothing."""


@dataclass(frozen=True)
class Store:
    """A root: a folder, or a URI such as s3://bucket/prefix that Arrow knows. Can be sent to other processes."""

    uri: str

    def __str__(self) -> str:
        return self.uri

    def walk(self) -> Iterator[str]:
        """Every file below, by its path from the root. Raises FileNotFoundError or NotADirectoryError."""
        system, root = self._open()
        for info in system.get_file_info(FileSelector(root, recursive=True)):
            if info.type == FileType.File:
                yield os.path.relpath(info.path, root)

    def names(self, folder: str) -> list[str]:
        """Names of the files in `folder`; none if it is not there."""
        system, root = self._open()
        found = system.get_file_info(FileSelector(f"{root}/{folder}", allow_not_found=True))
        return [info.base_name for info in found if info.type == FileType.File]

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None if it is not there."""
        try:
            return self.require(name)
        except FileNotFoundError:
            return None

    def require(self, name: str) -> bytes:
        """A file's bytes. Raises OSError."""
        system, root = self._open()
        with system.open_input_file(f"{root}/{name}") as file:
            content: bytes = file.read()
        return content

    def write(self, name: str, content: "bytes | mmap.mmap | pa.Buffer") -> None:
        """Write a file, in place of one that is there; nobody ever sees half of it."""
        system, root = self._open()
        path = f"{root}/{name}"
        system.create_dir(path.rpartition("/")[0], recursive=True)
        whole = system.type_name in _APPEARS_WHEN_CLOSED
        beside = path if whole else f"{path}.{os.getpid()}.partial"
        with system.open_output_stream(beside) as file:
            file.write(content)
        if whole:
            return
        if isinstance(system, LocalFileSystem):  # on the disk before it has its name: a power cut may come between
            descriptor = os.open(beside, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        system.move(beside, path)

    def _open(self) -> tuple[FileSystem, str]:
        if "://" in self.uri:
            try:
                system, root = FileSystem.from_uri(self.uri)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{self.uri}: {error}") from error
            return system, root.rstrip("/")
        return LocalFileSystem(), str(Path(self.uri).absolute())
