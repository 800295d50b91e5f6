"""The two kinds of TensorRT that build engines, behind one small interface; neither is imported unasked."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import runtime
from runtime.flavour import load_flavour


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
        return _module(self.name)

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
        return _module(self.name)

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
        # Its memory is then the server's to give, without which the work of a batch cannot be made a CUDA graph.
        config.set_flag(self.load().BuilderFlag.REQUIRE_USER_ALLOCATION)

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


def _module(flavour: str) -> Any:
    try:
        return load_flavour(flavour)
    except runtime.NotInstalled as error:
        raise NotInstalled(str(error)) from error
