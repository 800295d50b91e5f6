"""What a request can be answered instead of boxes.

ServiceError                 status  code
├── BadRequest                  400  bad_request
│   ├── BadParameter            400  bad_parameter
│   └── BadBody                 400  bad_body
├── Unauthorized                401  unauthorized
├── AdminDisabled               403  admin_disabled          no admin keys are set
├── PathForbidden               403  path_forbidden          of a bundle
├── BodyTimeout                 408  body_timeout
├── SwapInProgress              409  swap_in_progress        one at a time
├── NoSwap                      409  no_swap                 none is under way that could be ended
├── BodyTooLarge                413  too_many_bytes
├── TooManyImages               413  too_many_images
├── MediaTypeUnsupported        415  unsupported_media_type
├── ImageError                  422  image_unreadable        of one image: it stands in its place in the answer
│   ├── ImageEmpty              422  image_empty
│   ├── ImageTruncated          422  image_truncated
│   ├── ImageAnimated           422  image_animated
│   ├── ShapeUnsupported        422  unsupported_shape
│   ├── ImageTooLarge           413  too_many_pixels
│   ├── FormatUnsupported       415  unsupported_format
│   └── ImageMislabelled        415  image_mislabelled
├── NothingReadable             422  nothing_readable        several images, and none could be read
├── BundleNotPromoted           422  bundle_not_promoted     it was refused, or the old one is back
├── QueueFull                   429  queue_full              with Retry-After
├── EngineFailed                500  engine_failed           of one image, too
├── Unavailable                 503  unavailable             with Retry-After
│   ├── Draining                503  draining
│   └── DeadlineUnmeetable      503  deadline_unmeetable
├── DeadlinePassed              504  deadline_passed
└── ClientGone                  499  client_gone             nobody is left to read it

StartupError                 the server cannot start: no engine for this machine, a bundle that cannot be served
└── ParityFailed             an engine's answers are not those of the bundle's proof
"""

from typing import ClassVar


class ServiceError(Exception):
    """Base of all that becomes `{"error": {"code", "message"}}`; the message is for the client to read."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"

    def __init__(self, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class BadRequest(ServiceError):
    """The request cannot be understood."""

    status, code = 400, "bad_request"


class BadParameter(BadRequest):
    """A query parameter or header has a value it cannot have."""

    code = "bad_parameter"


class BadBody(BadRequest):
    """The body is not what its content type says."""

    code = "bad_body"


class Unauthorized(ServiceError):
    """API keys are set, and the request carries none of them."""

    status, code = 401, "unauthorized"


class AdminDisabled(ServiceError):
    """The path is for administrators, and none has a key."""

    status, code = 403, "admin_disabled"


class PathForbidden(ServiceError):
    """A bundle's path is outside of `bundle_root`."""

    status, code = 403, "path_forbidden"


class SwapInProgress(ServiceError):
    """Another swap is under way."""

    status, code = 409, "swap_in_progress"


class NoSwap(ServiceError):
    """There is no swap that could be ended."""

    status, code = 409, "no_swap"


class BundleNotPromoted(ServiceError):
    """A new bundle is not in service; the message says what is wrong with it."""

    status, code = 422, "bundle_not_promoted"


class BodyTimeout(ServiceError):
    """The body comes too slowly: longer than `body_timeout_ms`, or others needed its place."""

    status, code = 408, "body_timeout"


class BodyTooLarge(ServiceError):
    """More bytes than `max_body_bytes`."""

    status, code = 413, "too_many_bytes"


class TooManyImages(ServiceError):
    """More images than `max_images_per_request`."""

    status, code = 413, "too_many_images"


class MediaTypeUnsupported(ServiceError):
    """The request's content type is none that /detect takes."""

    status, code = 415, "unsupported_media_type"


class ImageError(ServiceError):
    """One image cannot be read."""

    status, code = 422, "image_unreadable"


class ImageEmpty(ImageError):
    """No bytes where an image should be."""

    code = "image_empty"


class ImageTruncated(ImageError):
    """The file ends before the picture does."""

    code = "image_truncated"


class ImageAnimated(ImageError):
    """More than one frame."""

    code = "image_animated"


class ShapeUnsupported(ImageError):
    """No canvas of the bundle holds it."""

    code = "unsupported_shape"


class ImageTooLarge(ImageError):
    """More pixels than `max_image_pixels`, by the file's header."""

    status, code = 413, "too_many_pixels"


class FormatUnsupported(ImageError):
    """A picture, or a document, of a format that is not on the list."""

    status, code = 415, "unsupported_format"


class ImageMislabelled(ImageError):
    """The body's content type names another format than the file is in."""

    status, code = 415, "image_mislabelled"


class NothingReadable(ServiceError):
    """A request of several images, of which none could be read."""

    status, code = 422, "nothing_readable"


class QueueFull(ServiceError):
    """`queue_limit` images are waiting already, or `max_queued_bytes` of uploads; of a lane, its share of these."""

    status, code = 429, "queue_full"


class EngineFailed(ServiceError):
    """The engine raised on this image alone, or was lost with it, twice."""

    status, code = 500, "engine_failed"


class Unavailable(ServiceError):
    """Not now, perhaps later."""

    status, code = 503, "unavailable"


class Draining(Unavailable):
    """The server is about to stop."""

    code = "draining"


class DeadlineUnmeetable(Unavailable):
    """The queue is longer than the caller's deadline allows for."""

    code = "deadline_unmeetable"


class DeadlinePassed(ServiceError):
    """The caller's deadline has passed."""

    status, code = 504, "deadline_passed"


class ClientGone(ServiceError):
    """The client closed the connection."""

    status, code = 499, "client_gone"


class StartupError(Exception):
    """The server cannot start; the message says what to change."""


class ParityFailed(StartupError):
    """An engine's answers are not those that the bundle's proof expects."""
