"""The Python modules of TensorRT and TensorRT-RTX, which share one API; neither is imported unasked."""

import atexit
import ctypes
import importlib
import importlib.util
import shutil
import sys
import tempfile
from collections import deque
from functools import cache
from logging import getLogger
from pathlib import Path
from typing import Any

from runtime.errors import NotInstalled

_LOG = getLogger("ddetr.tensorrt")

# The first of rtx is the package of NVIDIA's own archive and of the metapackage, the second what a plain wheel has.
_MODULES = {"tensorrt": ("tensorrt",), "rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_MISSING = {
    "tensorrt": "TensorRT is not installed: pip install tensorrt",
    "rtx": "TensorRT-RTX is not installed: pip install 'ddetr[rtx]'",
}


def load_flavour(name: str) -> Any:
    """The module of "tensorrt" or "rtx". Raises NotInstalled."""
    if name == "rtx":
        _name_for_the_parser()
    for module in _MODULES[name]:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise NotInstalled(f"{module} cannot be loaded: {error}") from error
        except (ImportError, OSError) as error:  # a library it needs
            raise NotInstalled(f"{module} cannot be loaded: {error}") from error
    raise NotInstalled(_MISSING[name])


@cache
def log_of(trt: Any) -> Any:
    """The logger of a module, which takes one a process: it hands all to `logging`, and keeps the newest errors."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=20)

        def log(self, severity: Any, message: str) -> None:
            # Without a GPU each error is followed by one that says so.
            if severity <= trt.ILogger.Severity.ERROR and "catchCudaError" not in message:
                self.errors.append(message)
            _LOG.debug("%s: %s", severity.name, message)

        def reason(self) -> str:
            """The first error since they were cleared, in one line: the ones after it are its consequences."""
            lines = "\n".join(tuple(self.errors)).strip().splitlines()  # of a copy: other threads may clear them
            return lines[0] if lines else "no reason given"

    return Log()


@cache
def _name_for_the_parser() -> None:
    """Give the wheel's library the name by which the parser looks for it.

    On meeting a plugin the parser of RTX 1.7 loads `libtensorrt_rtx.so`, which the wheel has as `libtensorrt_rtx.so.1`
    only, and where it finds none it ends the process. It looks in its own folder, which is the one it was loaded by:
    so it is loaded by a folder of links that has the name. Nothing is written beside the wheel's files. An engine needs
    no parser, but a process that runs one may build one later.
    """
    found = importlib.util.find_spec("tensorrt_rtx_libs")
    if found is None or not found.submodule_search_locations:
        return  # installed from NVIDIA's archive: on the loader's path, under every name
    wheel = Path(found.submodule_search_locations[0])
    library, parser = wheel / "libtensorrt_rtx.so.1", wheel / "libtensorrt_onnxparser_rtx.so.1"
    if (wheel / "libtensorrt_rtx.so").exists() or not library.exists() or not parser.exists():
        return
    if "tensorrt_rtx_libs" in sys.modules:
        raise NotInstalled("tensorrt_rtx_libs was imported before runtime.flavour: its parser would end the process")
    folder = Path(tempfile.mkdtemp(prefix="tensorrt-rtx-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "libtensorrt_rtx.so").symlink_to(library)
    for path in (library, parser):
        link = folder / path.name
        link.symlink_to(path)
        ctypes.CDLL(str(link))
