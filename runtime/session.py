"""An engine with its streams and buffers: what one instance of it needs to run batches one after another.

A batch goes: laid in a buffer of the host that the GPU reads by itself (`stage`), copied from there while another batch
is computed (`upload`), moved into the engine's own input and computed, the answer copied back (`run`), waited for
(`fetch`). Written against the API that TensorRT 10, 11 and RTX share. It has not run on a GPU yet: the tests hold it to
a double of CUDA and TensorRT that checks every copy, event, shape and address.
"""

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.cuda import Address, Cuda, Handle
from runtime.errors import CudaFailed
from runtime.graph_io import Part, Profile, read_graph_io
from runtime.program import Contexts, Graphs, Program

MOST_PROGRAMS = 256
"""Pairs of canvas and batch size that are kept ready; beyond, the one unused for longest goes."""

_SLOTS = 2  # one is computed from, one filled


@dataclass(frozen=True, eq=False)
class Answer:
    """A batch's answer, as the served graph gives it."""

    boxes: NDArray[np.float32]  # [N, K, 4]
    scores: NDArray[np.float32]  # [N, K]
    labels: NDArray[np.int64]  # [N, K]


@dataclass(eq=False)
class _Slot:
    """Where a batch waits: on the host, and then on the GPU."""

    host: Address
    gpu: Address
    uploaded: Handle  # the GPU has it all
    taken: Handle  # the engine has moved it into its input


class Staged:
    """A batch to be filled in. Once run, or forgotten, its place is free for another."""

    def __init__(self, profile: Profile, count: int, slot: _Slot | None, memory: Address, parts: Any) -> None:
        self.profile = profile
        self.count = count
        self.slot = slot
        self.images: NDArray[np.uint8] = _view(memory, parts["images"], count)  # [N, H, W, 3]
        self.sizes: NDArray[np.int64] = _view(memory, parts["sizes"], count)  # [N, 2] (h, w)
        self.release: Callable[[], Any] = lambda: None
        self.memory: Any = None  # its own, where it has no slot
        self.ran = False


class TensorRTSession:
    """One engine's instance.

    `stage` and `upload` may be called in one thread while `run` and `fetch` are in another; otherwise it is used from
    one thread at a time. Raises what `runtime.errors` has, and ValueError for a batch that no profile takes.
    """

    def __init__(
        self,
        engine: Any,
        trt: Any,
        cuda: Cuda,
        device: int,
        *,
        name: str = "",
        graphs: bool = True,
        kernels: Path | None = None,
    ) -> None:
        self.name = name
        self._cuda, self._device, self._trt = cuda, device, trt
        self._graphs = Graphs(wanted=graphs)
        self._programs: dict[tuple[int, int], Program] = {}
        self._slots: list[_Slot] = []
        with self._setting_up() as held:
            self.io = read_graph_io(engine, trt)
            self._by_canvas = {(each.height, each.width): each for each in reversed(self.io.profiles)}
            self._copying = self._new(held, cuda.new_stream, cuda.free_stream)
            self._computing = self._new(held, cuda.new_stream, cuda.free_stream)
            self._answered = self._new(held, cuda.new_event, cuda.free_event)
            self._input = self._memory(held, self.io.input_bytes)
            self._output_parts, self._output_bytes = self.io.outputs()
            self._output = self._memory(held, self._output_bytes)
            self._output_host = self._host_memory(held, self._output_bytes)
            for _ in range(_SLOTS):
                host, gpu = self._host_memory(held, self.io.input_bytes), self._memory(held, self.io.input_bytes)
                events = [self._new(held, cuda.new_event, cuda.free_event) for _ in range(2)]
                self._slots.append(_Slot(host, gpu, *events))
            memory_bytes = max(1, int(engine.device_memory_size_v2))
            self._contexts = Contexts(engine, trt, self._memory(held, memory_bytes), memory_bytes, kernels)
            held.callback(self._drop_programs)

    @property
    def graphs(self) -> bool:
        """Whether batches are CUDA graphs, from the second of a kind on."""
        return self._graphs.on

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """The canvases it takes, and how large batches."""
        return self.io.profiles

    def stage(self, count: int, height: int, width: int) -> Staged:
        """Room for a batch on this canvas, to be written to. Where none of the GPU's kind is free, it is of another."""
        profile = self._profile(count, height, width)
        parts, _ = self.io.inputs(height, width)
        slot: _Slot | None = None
        with suppress(IndexError):  # batches were taken back, and wait to be forgotten
            slot = self._slots.pop()
        if slot is None:
            memory = np.empty(self._bytes(profile, count), np.uint8)
            staged = Staged(profile, count, None, memory.ctypes.data, parts)
            staged.memory = memory
            return staged
        staged = Staged(profile, count, slot, slot.host, parts)
        release = weakref.finalize(staged, self._slots.append, slot)
        release.atexit = False
        staged.release = release
        self._cuda.use(self._device)
        self._cuda.await_event(slot.uploaded)  # a batch that was forgotten may still be on its way
        return staged

    def upload(self, staged: Staged) -> None:
        """Begin to copy the batch, which is not to be written to any more."""
        if staged.slot is None:
            return
        cuda, slot = self._cuda, staged.slot
        cuda.use(self._device)
        cuda.hold(self._copying, slot.taken)  # of the batch before it in this place
        cuda.to_gpu(slot.gpu, slot.host, self._bytes(staged.profile, staged.count), self._copying)
        cuda.record(slot.uploaded, self._copying)

    def run(self, staged: Staged) -> Staged:
        """Queue the batch, once `upload` was called on it. Its answer is to be fetched before the next is run."""
        cuda, stream = self._cuda, self._computing
        size = self._bytes(staged.profile, staged.count)
        if staged.ran:
            raise ValueError("this batch was run already, and its place may hold another")
        staged.ran = True
        cuda.use(self._device)
        try:
            program = self._program(staged.profile, staged.count)
            if staged.slot is None:
                cuda.to_gpu(self._input, staged.memory.ctypes.data, size, stream)
            else:
                cuda.hold(stream, staged.slot.uploaded)
                cuda.on_gpu(self._input, staged.slot.gpu, size, stream)
                cuda.record(staged.slot.taken, stream)
            program.enqueue(stream)
            cuda.to_host(self._output_host, self._output, self._output_bytes, stream)
            cuda.record(self._answered, stream)
        except BaseException:
            with suppress(CudaFailed):  # what was queued reads memory that is let go now
                cuda.await_stream(stream)
            raise
        finally:
            staged.release()
        return staged

    def fetch(self, staged: Staged) -> Answer:
        """Wait for the answer of what was run last."""
        self._cuda.use(self._device)
        self._cuda.await_event(self._answered)
        views = {name: _view(self._output_host, part, staged.count) for name, part in self._output_parts.items()}
        return Answer(**{name: view.copy() for name, view in views.items()})

    def infer(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> Answer:
        """All four in turn. images: [N, H, W, 3] on a canvas; sizes: [N, 2] (h, w)."""
        staged = self.stage(len(images), *images.shape[1:3])
        staged.images[...] = images
        staged.sizes[...] = sizes
        self.upload(staged)
        return self.fetch(self.run(staged))

    def warm(self, count: int, height: int, width: int) -> None:
        """Run black pictures twice: all that the first times of this canvas and batch size take is done."""
        images = np.zeros((count, height, width, 3), np.uint8)
        sizes = np.full((count, 2), (height, width), np.int64)
        for _ in range(2):
            self.infer(images, sizes)

    def keep_kernels(self) -> None:
        """Write the kernels that RTX has compiled by now into the file that the session was opened with."""
        self._contexts.keep_kernels()

    def layer_information(self) -> str:
        """What the engine says of its own layers, in TensorRT's JSON; call it after a batch, whose shapes it tells."""
        return self._contexts.layer_information(next(reversed(self._programs.values())).context)

    def close(self) -> None:
        """Wait for what is under way, and give everything back. A second call does nothing."""
        self._resources.close()

    def _profile(self, count: int, height: int, width: int) -> Profile:
        profile = self._by_canvas.get((height, width))
        if profile is None:
            there = ", ".join(f"{each.height}x{each.width}" for each in self.io.profiles)
            raise ValueError(f"the engine has no profile for canvas {height}x{width}, only for {there}")
        if not 1 <= count <= profile.most:
            raise ValueError(f"the engine takes 1 to {profile.most} images of canvas {height}x{width}, not {count}")
        return profile

    def _bytes(self, profile: Profile, count: int) -> int:
        images = self.io.inputs(profile.height, profile.width)[0]["images"]
        return images.offset + images.size(count)

    def _program(self, profile: Profile, count: int) -> Program:
        key = (profile.index, count)
        program = self._programs.pop(key, None)
        if program is None:
            if len(self._programs) >= MOST_PROGRAMS:
                self._cuda.await_stream(self._computing)
                self._programs.pop(next(iter(self._programs))).free()
            parts, _ = self.io.inputs(profile.height, profile.width)
            shapes = {name: (count, *part.axes) for name, part in parts.items()}
            addresses = {name: self._input + part.offset for name, part in parts.items()}
            addresses |= {name: self._output + part.offset for name, part in self._output_parts.items()}
            context = self._contexts.make(profile.index, shapes, addresses, self._computing)
            program = Program(context, self._trt, self._cuda, self._graphs)
        self._programs[key] = program  # the newest lie last
        return program

    def _drop_programs(self) -> None:
        while self._programs:
            with suppress(CudaFailed):  # as in `_quietly`
                self._programs.popitem()[1].free()
        del self._contexts

    @contextmanager
    def _setting_up(self) -> Iterator[ExitStack]:
        self._resources = ExitStack()
        self._cuda.use(self._device)
        try:
            yield self._resources
        except BaseException:
            self.close()
            raise
        self._resources.callback(self._settle)

    def _settle(self) -> None:
        self._cuda.use(self._device)
        for stream in (self._copying, self._computing):
            with suppress(CudaFailed):
                self._cuda.await_stream(stream)

    def _new(self, held: ExitStack, make: Callable[[], Handle], free: Callable[[Handle], None]) -> Handle:
        made = make()
        held.callback(_quietly, free, made)
        return made

    def _memory(self, held: ExitStack, size: int) -> Address:
        return self._new(held, lambda: self._cuda.allocate(size), self._cuda.free)

    def _host_memory(self, held: ExitStack, size: int) -> Address:
        return self._new(held, lambda: self._cuda.allocate_host(size), self._cuda.free_host)


def _quietly(free: Callable[[Handle], None], what: Handle) -> None:
    with suppress(CudaFailed):  # after one error that stays no call succeeds, and the rest is to be let go, too
        free(what)


def _view(memory: Address, part: Part, count: int) -> NDArray[Any]:
    """A batch's part of the memory that begins at `memory`."""
    content = np.ctypeslib.as_array((ctypes.c_uint8 * part.size(count)).from_address(memory + part.offset))
    return content.view(part.dtype).reshape(count, *part.axes)
