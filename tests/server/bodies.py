"""Bodies as they come: in pieces of any size."""

from collections.abc import AsyncIterator, Iterator

from starlette.datastructures import Headers

from server.body import check_media_type, reader_for
from server.errors import ImageError, ServiceError

SMALL_BYTES = 40_000
"""Up to here a body is fed byte by byte, too."""


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def split(body: bytes, headers: Headers, max_images: int) -> list[bytes | ImageError]:
    """The images of a body, the same however it comes; so is what it raises."""
    outcomes = [_outcome(pieces, headers, max_images) for pieces in _ways(body)]
    told = [_told(outcome) for outcome in outcomes]
    for each in told[1:]:
        assert each == told[0]
    if isinstance(outcomes[0], ServiceError):
        raise outcomes[0]
    return outcomes[0]


def _ways(body: bytes) -> Iterator[list[bytes]]:
    yield [body] if body else []
    yield [b"", body[: len(body) // 2], b"", body[len(body) // 2 :], b""]
    for size in (1, 2, 7, 1000) if len(body) <= SMALL_BYTES else (65_521,):
        yield [body[at : at + size] for at in range(0, len(body), size)]


def _outcome(pieces: list[bytes], headers: Headers, max_images: int) -> list[bytes | ImageError] | ServiceError:
    try:
        check_media_type(headers)
        reader = reader_for(headers, max_images)
        for piece in pieces:
            reader.write(piece)
        return reader.close()
    except ServiceError as error:
        return error


def _told(outcome: list[bytes | ImageError] | ServiceError) -> object:
    if isinstance(outcome, ServiceError):
        return type(outcome), outcome.message
    return [(type(each), each.message) if isinstance(each, ImageError) else (len(each), hash(each)) for each in outcome]
