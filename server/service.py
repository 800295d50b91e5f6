"""An image's way, from bytes to detections, and the resources it needs: threads to decode, the batcher, the engines."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from PIL import Image

from bundle import Manifest
from server.admit import Admission, Limits, Ticket
from server.batch_queue import Priority
from server.batcher import CHECK_EVERY_S, Batcher
from server.decode import prepare_decoding
from server.decoders import Decoders
from server.draw import draw_detections, encode_png
from server.errors import DeadlinePassed, ImageError, ServiceError
from server.line import Line, Place
from server.malloc import give_back
from server.metrics import Metrics
from server.options import DetectOptions, category_ids
from server.postprocess import Detection, postprocess
from server.preprocess import Pixels, PreparedImage, preprocess
from server.respond import ImageAnswer, Outcome
from server.served import CLOSE_S, Opened, Served
from server.settings import Settings
from server.shadow import Copy, Shadow
from server.timing import StageTimes

T = TypeVar("T")

logger = logging.getLogger("ddetr.service")

# What drawing takes of a pixel beside the pixels: a picture of them, its copy, and the file.
_DRAWING_BYTES = 12

_QUEUED_BODIES = 4  # of the largest, where `max_queued_bytes` says nothing


class Service:
    """Serves one bundle, and another one after `switch`. Start it in the event loop that it is used from."""

    def __init__(
        self,
        settings: Settings,
        opened: Opened,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.clock = clock
        self.served = Served(opened, settings, metrics, clock)
        """What new requests are answered by."""
        self.shadow: Shadow | None = None
        """What live pictures are shown to as well, while a new bundle is tried or watched."""
        self._beside: list[Served] = []  # what others may still be answered by, or again, or soon
        self._limits = Limits(
            images=settings.queue_limit,
            queued_bytes=settings.max_queued_bytes or _QUEUED_BODIES * settings.max_body_bytes,
            body_bytes=settings.max_body_bytes,
            body_timeout_s=settings.body_timeout_ms / 1e3,
        )
        estimate = self.served.estimate
        line = Line(estimate, settings.max_batch_size, settings.decode_threads, clock)
        self.admission = Admission(self._limits, line, estimate, settings.max_batch_size, clock)
        self._watching: asyncio.Task[None] | None = None
        prepare_decoding(settings.decode_threads)
        self._decoders = Decoders(
            settings.decode_threads,
            settings.max_image_pixels,
            settings.max_decode_bytes,
            clock,
            unhurried=lambda: self.batcher.provided,
        )
        self.leaving = False
        """Requests are still taken, but no more should be sent here."""
        self._started = False
        self._start_lock = asyncio.Lock()
        metrics.watch_queue(
            lambda: sum(served.batcher.waiting for served in self._all_served()), lambda: self.admission.held_bytes
        )
        self._tell_model()

    @property
    def batcher(self) -> Batcher:
        """Of the bundle in service."""
        return self.served.batcher

    async def start(self) -> None:
        """Warm every engine on every canvas; the service is ready afterwards. A second call does nothing."""
        async with self._start_lock:
            if self._started:
                return
            started_s = self.clock()
            await self.served.warm()
            self._watching = asyncio.create_task(self._watch())
            self._started = True
            logger.info(
                "%s %s ready on %s: %d canvases warmed in %.1f s",
                self.served.manifest.model.name,
                self.served.manifest.model.version,
                self.served.engine_name,
                len(self.served.manifest.canvases),
                self.clock() - started_s,
            )

    def look_after(self, served: Served) -> None:
        """See to the engines of a bundle that is warm and gets no requests yet, until it is switched to or retired."""
        self._beside = [*self._beside, served]

    def switch(self, served: Served) -> Served:
        """Answer new requests by `served`, which is warm, from now on. Returns what they were answered by so far.

        That one stays as it is: requests under way finish there, and it can be switched back to until `retire`.
        """
        before, self.served = self.served, served
        self._beside = [*(each for each in self._beside if each is not served), before]
        served.estimate.take_over(before.estimate)
        self.admission.use(served.estimate)
        self._tell_model()
        return before

    async def retire(self, served: Served, patience_s: float = CLOSE_S) -> list[Future[None]]:
        """Let a bundle go that no new request gets, once no request uses it, and its memory with it.

        A future is of an engine that has not given it back after `patience_s`.
        """
        served.batcher.replaced()
        await served.unused()
        self._beside = [each for each in self._beside if each is not served]
        hanging = await served.close(patience_s)
        await asyncio.to_thread(give_back)
        return hanging

    def drain(self) -> None:
        """Let nobody in any more; what was admitted is finished."""
        self.admission.draining = True
        for served in self._all_served():
            served.batcher.drain()

    async def stop(self) -> None:
        """Drain, and let everything go. Requests under way have ended, or are failed now."""
        self.drain()
        if self._watching is not None:
            self._watching.cancel()
        for served in self._all_served():
            await served.batcher.close()
        self._decoders.stop()

    def why_not_ready(self) -> str | None:
        """Why no request should be sent here, or None."""
        if not self._started:
            return "starting"
        if self.stopping:
            return "draining"
        if self.batcher.works:
            return None
        why = self.batcher.opening_failed
        return "restarting the engine" if why is None else f"restarting the engine; the last try failed: {why}"

    def degraded(self) -> str | None:
        """Why requests are answered by another engine than they should be, or None."""
        standing_in = (verdict for verdict in self.served.verdicts if verdict.passed_over)
        told = (f"{verdict.engine} stands in for {'; '.join(verdict.passed_over)}" for verdict in standing_in)
        return "; ".join(dict.fromkeys(told)) or None

    @property
    def stopping(self) -> bool:
        """Whether it is about to stop, or has begun to."""
        return self.admission.draining or self.leaving

    def trouble(self) -> str | None:
        """Why the process should be restarted unless this passes soon: a stage that does not get on. None if all do."""
        if self._decoders.stalled(self.settings.stall_timeout_ms / 1e3):
            return "no progress in decode"
        return self.batcher.trouble()

    async def detect(
        self,
        uploads: Sequence[bytes | ImageError],
        options: DetectOptions,
        deadline_s: float,
        ticket: Ticket,
        served: Served,
        arrived_s: float | None = None,
    ) -> list[Outcome]:
        """The outcome of every upload, in their order, by the bundle that the request came to.

        To give up, cancel. Raises BadParameter for unknown classes.

        An image's stage times lie end to end, from `arrived_s` (now, if not given) until its outcome is there.
        """
        admitted_s = self.clock()
        came_s = admitted_s if arrived_s is None else arrived_s
        await self.start()  # has happened already, unless the ASGI server knows no lifespan
        wanted_ids = category_ids(options.classes, served.manifest.categories)

        async def detect_one(upload: bytes | ImageError, place: Place) -> Outcome:
            copy = None if self.shadow is None else self.shadow.want(served)
            try:
                if isinstance(upload, ImageError):
                    raise upload
                image = await self._prepare(upload, served.manifest, copy, deadline_s, came_s, admitted_s)
                del upload
                place.decoded(image.canvas)
                inferred = await served.infer(image, deadline_s, place.dispatched, ticket.priority)
                if copy is not None:
                    copy.show(inferred.raw)
            except ServiceError as error:
                return error
            finally:
                place.leave()
                if copy is not None:
                    copy.leave()
                self._decoders.deliver()  # its batch is done, so an engine may want what has been held back
            detections = postprocess(
                inferred.raw,
                image.width,
                image.height,
                served.manifest.categories,
                threshold=options.threshold,
                max_detections=options.max_detections,
                wanted_ids=wanted_ids,
            )
            times = image.times._replace(
                # What is left between preprocess and the answer, the way back into the event loop included.
                queue=(inferred.answered_s - came_s) * 1e3 - image.times.total - inferred.inference_ms,
                inference=inferred.inference_ms,
                postprocess=(self.clock() - inferred.answered_s) * 1e3,
            )
            return ImageAnswer(image.width, image.height, detections, times, inferred.batch_size)

        work = [detect_one(upload, place) for upload, place in zip(uploads, ticket.places, strict=True)]
        del uploads
        outcomes = [await work[0]] if len(work) == 1 else await _all(work)
        ticket.answered()
        return outcomes

    def most_images(self, priority: Priority) -> int:
        """Of one request."""
        # More than the queue holds could never be let in: better a refusal than to be told to come back later.
        return min(self.settings.max_images_per_request, self._limits.images_of(priority))

    async def draw(self, upload: bytes, detections: Sequence[Detection]) -> bytes:
        """The upload as a PNG with its detections drawn on it."""

        def draw(picture: Pixels) -> bytes:
            return encode_png(draw_detections(Image.fromarray(picture), detections))

        # Decoded a second time: to keep every picture until its answer is there would cost far more.
        return await self._decoders.decode(upload, draw, more_bytes_a_pixel=_DRAWING_BYTES)

    async def _prepare(
        self,
        upload: bytes,
        manifest: Manifest,
        copy: Copy | None,
        deadline_s: float,
        arrived_s: float,
        admitted_s: float,
    ) -> PreparedImage:
        def check() -> None:
            if self.clock() >= deadline_s:
                raise DeadlinePassed("the deadline passed before a thread was free to decode the image")

        def prepare(picture: Pixels) -> PreparedImage:
            decoded_s = self.clock()
            pixels, canvas = preprocess(picture, manifest)
            if copy is not None:
                copy.keep(picture, pixels, canvas)
            times = StageTimes(
                admit=(admitted_s - arrived_s) * 1e3,
                decode=(decoded_s - admitted_s) * 1e3,
                preprocess=(self.clock() - decoded_s) * 1e3,
            )
            return PreparedImage(pixels, canvas, picture.shape[1], picture.shape[0], times)

        return await self._decoders.decode(upload, prepare, check=check)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            try:
                self._decoders.deliver()
                for served in self._all_served():
                    served.batcher.check()
                if self.served.verdicts != self._told_verdicts:  # an engine is back, perhaps as another kind
                    self._tell_model()
            except Exception:  # without this watch no engine would ever be replaced again
                logger.exception("looking after the engines failed")

    def _all_served(self) -> list[Served]:
        return [self.served, *self._beside]

    def _tell_model(self) -> None:
        self._told_verdicts = self.served.verdicts
        self.metrics.set_model(self.served.manifest, self.served.engine_name)
        self.metrics.set_verdicts(self._told_verdicts)


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results. If something raises, nothing goes on for nobody."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
