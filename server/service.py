"""An image's way, from bytes to detections, and the resources it needs: threads to decode, the batcher, the engines."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from PIL import Image
from starlette.datastructures import Headers

from server.admit import Admission, Limits, Ticket
from server.batch_queue import BatchQueue, Priority
from server.batcher import CHECK_EVERY_S, Batcher
from server.body import split_images
from server.decode import prepare_decoding
from server.decoders import Decoders
from server.draw import draw_detections, encode_png
from server.engine import Engine, OpenEngine
from server.errors import DeadlinePassed, ImageError, ServiceError
from server.estimate import Estimate
from server.line import Line, Place
from server.metrics import Metrics
from server.options import DetectOptions, category_ids
from server.postprocess import Detection, postprocess
from server.preprocess import Pixels, PreparedImage, preprocess
from server.progress import Progress
from server.respond import ImageAnswer, Outcome
from server.settings import Settings
from server.timing import StageTimes

T = TypeVar("T")

logger = logging.getLogger("ddetr.service")

# Up to here taking a body apart is quicker than handing it to a thread; 30 MB of JSON would hold everyone up for 0.3 s.
_INLINE_BYTES = 1 << 20

# What drawing takes of a pixel beside the pixels: a picture of them, its copy, and the file.
_DRAWING_BYTES = 12

_QUEUED_BODIES = 4  # of the largest, where `max_queued_bytes` says nothing


class Service:
    """Serves one model. Start it in the event loop that it is used from."""

    def __init__(
        self,
        settings: Settings,
        engines: Sequence[Engine],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        reopen: OpenEngine | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.clock = clock
        self.manifest = engines[0].manifest
        self.engine_name = engines[0].name
        self._estimate = Estimate(len(engines))
        self._limits = Limits(
            images=settings.queue_limit,
            queued_bytes=settings.max_queued_bytes or _QUEUED_BODIES * settings.max_body_bytes,
            body_bytes=settings.max_body_bytes,
            body_timeout_s=settings.body_timeout_ms / 1e3,
        )
        line = Line(self._estimate, settings.max_batch_size, settings.decode_threads, clock)
        self.admission = Admission(self._limits, line, self._estimate, settings.max_batch_size, clock)
        self.batcher = Batcher(
            engines,
            BatchQueue(settings.max_batch_size, settings.max_delay_ms / 1e3),
            self._estimate,
            metrics,
            clock,
            reopen=reopen,
            stall_timeout_s=settings.stall_timeout_ms / 1e3,
        )
        self._watching: asyncio.Task[None] | None = None
        self._decoding = Progress(clock)
        prepare_decoding(settings.decode_threads)
        self._decoders = Decoders(
            settings.decode_threads,
            settings.max_image_pixels,
            settings.max_decode_bytes,
            self._decoding,
            large_progress=Progress(clock),
        )
        self._started = False
        self._start_lock = asyncio.Lock()
        metrics.watch_queue(lambda: self.batcher.waiting, lambda: self.admission.held_bytes)
        metrics.set_model(self.manifest, self.engine_name)

    async def start(self) -> None:
        """Warm every engine on every canvas; the service is ready afterwards. A second call does nothing."""
        async with self._start_lock:
            if self._started:
                return
            started_s = self.clock()
            await self.batcher.warm()
            self._watching = asyncio.create_task(self._watch())
            self._started = True
            logger.info(
                "%s %s ready on %s: %d canvases warmed in %.1f s",
                self.manifest.model.name,
                self.manifest.model.version,
                self.engine_name,
                len(self.manifest.canvases),
                self.clock() - started_s,
            )

    def drain(self) -> None:
        """Let nobody in any more; what was admitted is finished."""
        self.admission.draining = True
        self.batcher.drain()

    async def stop(self) -> None:
        """Drain, and let everything go. Requests under way have ended, or are failed now."""
        self.drain()
        if self._watching is not None:
            self._watching.cancel()
        await self.batcher.close()
        self._decoders.stop()

    def why_not_ready(self) -> str | None:
        """Why no request should be sent here, or None."""
        if not self._started:
            return "starting"
        if self.admission.draining:
            return "draining"
        return None if self.batcher.works else "restarting the engine"

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
        arrived_s: float | None = None,
    ) -> list[Outcome]:
        """The outcome of every upload, in their order. To give up, cancel. Raises BadParameter for unknown classes.

        An image's stage times lie end to end, from `arrived_s` (now, if not given) until its outcome is there.
        """
        admitted_s = self.clock()
        came_s = admitted_s if arrived_s is None else arrived_s
        await self.start()  # has happened already, unless the ASGI server knows no lifespan
        wanted_ids = category_ids(options.classes, self.manifest.categories)

        async def detect_one(upload: bytes | ImageError, place: Place) -> Outcome:
            try:
                if isinstance(upload, ImageError):
                    raise upload
                image = await self._prepare(upload, deadline_s, came_s, admitted_s)
                del upload
                place.decoded(image.canvas)
                inferred = await self.batcher.infer(image, deadline_s, place.dispatched, ticket.priority)
            except ServiceError as error:
                return error
            finally:
                place.leave()
            detections = postprocess(
                inferred.raw,
                image.width,
                image.height,
                self.manifest.categories,
                threshold=options.threshold,
                max_detections=options.max_detections,
                wanted_ids=wanted_ids,
            )
            times = replace(
                image.times,
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

    async def split(self, body: bytes, headers: Headers, priority: Priority) -> list[bytes | ImageError]:
        """The image files in a request's body, see `split_images`; large bodies are taken apart beside the loop."""
        # More than the queue holds could never be let in: better a refusal than to be told to come back later.
        most = min(self.settings.max_images_per_request, self._limits.images_of(priority))
        if len(body) <= _INLINE_BYTES:
            return split_images(body, headers, most)
        return await self._decoders.run(split_images, body, headers, most)

    async def draw(self, upload: bytes, detections: Sequence[Detection]) -> bytes:
        """The upload as a PNG with its detections drawn on it."""

        def draw(picture: Pixels) -> bytes:
            return encode_png(draw_detections(Image.fromarray(picture), detections))

        # Decoded a second time: to keep every picture until its answer is there would cost far more.
        return await self._decoders.decode(upload, draw, more_bytes_a_pixel=_DRAWING_BYTES)

    async def _prepare(self, upload: bytes, deadline_s: float, arrived_s: float, admitted_s: float) -> PreparedImage:
        def check() -> None:
            if self.clock() >= deadline_s:
                raise DeadlinePassed("the deadline passed before a thread was free to decode the image")

        def prepare(picture: Pixels) -> PreparedImage:
            decoded_s = self.clock()
            pixels, canvas = preprocess(picture, self.manifest)
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
                self.batcher.check()
            except Exception:  # without this watch no engine would ever be replaced again
                logger.exception("looking after the engines failed")


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results. If something raises, nothing goes on for nobody."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
