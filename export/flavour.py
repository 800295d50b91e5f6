"""The two kinds of TensorRT that build engines, behind one small interface; neither is imported unasked."""

import atexit
import ctypes
import importlib
import importlib.util
import shutil
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar


class BuildError(RuntimeError):
    """No engine can be built; one line says why.

    BuildError
     |- NotInstalled       the flavour's Python package is not there, or cannot be loaded
     |- TargetError        it builds no engine for that GPU
     |- PluginMissing      the op's plugin was not compiled, or the registry does not take it
     |- NotParsed          the graph has a node that it does not understand, or layers that it must not have
     |- NotBuilt           the builder gave up
    """


class NotInstalled(BuildError):
    pass


class TargetError(BuildError):
    pass


class Flavour(ABC):
    """What differs between the two; the rest of their API is one."""

    name: ClassVar[str]
    times_kernels: ClassVar[bool]
    """Whether it measures kernels while it builds, and can keep what it measured."""

    @abstractmethod
    def load(self) -> Any:
        """Its Python module. Raises NotInstalled."""

    @abstractmethod
    def targets(self, asked: Sequence[str]) -> tuple[str, ...]:
        """The architectures ("sm86") an engine will be built for: those asked for, else this machine's GPU.

        Raises TargetError naming the first that it cannot build for.
        """

    @abstractmethod
    def aim(self, config: Any, targets: Sequence[str]) -> None:
        """Set the builder's configuration to what `targets` or `widened` returned."""

    @abstractmethod
    def widened(self, targets: Sequence[str]) -> tuple[str, ...]:
        """The targets of an engine for these GPUs and later ones: "sm80+". Raises TargetError where there is none."""


class TensorRT(Flavour):
    """TensorRT times its kernels while it builds: it builds on a GPU, and for that GPU alone."""

    name, times_kernels = "tensorrt", True

    def load(self) -> Any:
        return _first_module(("tensorrt",), "TensorRT is not installed: pip install tensorrt")

    def targets(self, asked: Sequence[str]) -> tuple[str, ...]:
        here = gpu_architecture()
        if others := [target for target in asked if target != here]:
            raise TargetError(f"TensorRT builds for the GPU of its machine, {here}, not for {', '.join(others)}")
        return (here,)

    def aim(self, config: Any, targets: Sequence[str]) -> None:
        if any(target.endswith("+") for target in targets):
            config.hardware_compatibility_level = self.load().HardwareCompatibilityLevel.AMPERE_PLUS

    def widened(self, targets: Sequence[str]) -> tuple[str, ...]:
        if older := [target for target in targets if _number(target) < _AMPERE]:
            raise TargetError(f"an engine for other GPUs is built on Ampere (sm80) or a later one, not on {older[0]}")
        return (f"sm{_AMPERE}+",)


class TensorRTRTX(Flavour):
    """TensorRT-RTX builds without a GPU, for several at once: GeForce and workstation cards.

    For Turing (sm75) release 1.7 has no float32 matrix products, which every network here has some of.
    """

    name, times_kernels = "rtx", False  # it chooses them where the engine first runs

    def load(self) -> Any:
        _name_for_the_parser()
        # The first is the package of NVIDIA's own archive and of the metapackage, the second what a plain wheel has.
        names = ("tensorrt_rtx", "tensorrt_rtx_bindings")
        return _first_module(names, "TensorRT-RTX is not installed: pip install 'ddetr[rtx]'")

    def targets(self, asked: Sequence[str]) -> tuple[str, ...]:
        known = self.load().ComputeCapability.__members__
        targets = tuple(dict.fromkeys(asked)) or (gpu_architecture(),)
        for target in targets:
            if target.upper() not in known or not target.startswith("sm"):
                served = ", ".join(sorted((name.lower() for name in known if name.startswith("SM")), key=_number))
                raise TargetError(f"TensorRT-RTX builds for {served}, not for {target}")
        return targets

    def aim(self, config: Any, targets: Sequence[str]) -> None:
        capabilities = self.load().ComputeCapability
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(capabilities.__members__[target.upper()], index)

    def widened(self, targets: Sequence[str]) -> tuple[str, ...]:
        raise TargetError(
            f"TensorRT-RTX builds for the targets named, here {', '.join(targets)}, and has no hardware compatibility"
        )


_AMPERE = 80

FLAVOURS: dict[str, Flavour] = {flavour.name: flavour for flavour in (TensorRT(), TensorRTRTX())}
"""By the name that commands, manifests and engine files use."""


def gpu_architecture() -> str:
    """This machine's GPU, such as "sm86". Raises TargetError where there is none."""
    import torch  # takes seconds, and only a build without targets asks

    if not torch.cuda.is_available():
        raise TargetError("this machine has no NVIDIA GPU to build for")
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def _number(target: str) -> int:
    return int(target[2:])


def _first_module(names: Sequence[str], missing: str) -> Any:
    """The first of the modules that is installed."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise NotInstalled(f"{name} cannot be loaded: {error}") from error
        except (ImportError, OSError) as error:  # a library it needs
            raise NotInstalled(f"{name} cannot be loaded: {error}") from error
    raise NotInstalled(missing)


@cache
def _name_for_the_parser() -> None:
    """Give the wheel's library the name by which the parser looks for it.

    On meeting a plugin the parser of RTX 1.7 loads `libtensorrt_rtx.so`, which the wheel has as `libtensorrt_rtx.so.1`
    only, and where it finds none it ends the process. It looks in its own folder, which is the one it was loaded by:
    so it is loaded by a folder of links that has the name. Nothing is written beside the wheel's files.
    """
    found = importlib.util.find_spec("tensorrt_rtx_libs")
    if found is None or not found.submodule_search_locations:
        return  # installed from NVIDIA's archive: on the loader's path, under every name
    wheel = Path(found.submodule_search_locations[0])
    library, parser = wheel / "libtensorrt_rtx.so.1", wheel / "libtensorrt_onnxparser_rtx.so.1"
    if (wheel / "libtensorrt_rtx.so").exists() or not library.exists() or not parser.exists():
        return
    if "tensorrt_rtx_libs" in sys.modules:
        raise NotInstalled("tensorrt_rtx_libs was imported before export.flavour: its parser would end the process")
    folder = Path(tempfile.mkdtemp(prefix="tensorrt-rtx-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "libtensorrt_rtx.so").symlink_to(library)
    for path in (library, parser):
        link = folder / path.name
        link.symlink_to(path)
        ctypes.CDLL(str(link))
