"""What a user meets when an engine is built, and the way out of it."""

import errno
import re
import shutil
from pathlib import Path

from export.build import NotParsed, PluginMissing
from export.flavour import BuildError, NotInstalled, TargetError
from models import CheckpointError


class OtherModel(BuildError):
    """The bundle in the output was made of another checkpoint."""


class NoRoom(BuildError):
    """The disk cannot hold what is to be written."""


_OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|insufficient (?:memory|workspace)|could not find any implementation|bad_alloc"
    r"|(?:cannot|can't|failed to) allocate",
    re.IGNORECASE,
)


def check_room(folder: Path, need_bytes: int) -> None:
    """Raise NoRoom where the disk of `folder` has fewer bytes free."""
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise NoRoom(f"{folder} has {free / 2**20:.0f} MiB free, {need_bytes / 2**20:.0f} are needed")


def is_no_room(error: BaseException) -> bool:
    """Whether the disk was full, in whatever words."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def is_no_memory(error: BaseException) -> bool:
    """Whether memory was lacking, in whatever words: PyTorch and ONNX Runtime have each their own."""
    return isinstance(error, MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def way_out(error: BaseException) -> str:
    """What to do about it, to stand behind the message; empty where the message says it."""
    text = str(error)
    if isinstance(error, NoRoom) or is_no_room(error):
        return ": free some, or give --output and --work on another disk; finished steps are kept"
    if is_no_memory(error):
        if isinstance(error, BuildError):
            return ": give a smaller --max-batch-size, or --workspace-mib, or end what else uses the memory"
        return ": give smaller --canvases, or end what else uses the memory; finished steps are kept"
    if isinstance(error, PermissionError):
        return ": give --output and --work where this user may write"
    if isinstance(error, NotInstalled) and "pip install tensorrt" in text:
        return ", or build without it and without a GPU: --flavour rtx --targets sm86,sm89"
    if isinstance(error, TargetError) and "no NVIDIA GPU" in text:
        return ": build where one is, or for named ones with --flavour rtx --targets sm86,sm89"
    if isinstance(error, PluginMissing) and "brings no plugin" in text:
        return ": built for another version or machine; build it here: python -m plugins.build libmsda_tensorrt.so"
    if isinstance(error, NotParsed) and text.startswith("node "):
        return ": this TensorRT does not take it; try a newer one, or serve the bundle with ONNX Runtime"
    if isinstance(error, CheckpointError) and "variant" in text:
        return ": leave --variant out, or name the checkpoint's own"
    return ""
