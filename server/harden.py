"""The headers that tell browsers how little an answer may do. No CORS: other sites' scripts get to read nothing."""

from collections.abc import Iterable

RawHeaders = Iterable[tuple[bytes, bytes]]

# Whatever an answer says for itself wins; a page brings the policy that lets its own script run.
_ALWAYS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),  # answers hold what somebody's pictures show
)
_PAGES = (
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()"),
    (b"x-frame-options", b"DENY"),  # for browsers that do not know frame-ancestors
)


def harden(headers: RawHeaders) -> list[tuple[bytes, bytes]]:
    """`headers` (lower-case names) and those that are missing."""
    hardened = list(headers)
    given = dict(hardened)
    if b"etag" in given:  # a file of ours, the same for everybody
        given.setdefault(b"cache-control", b"")
    hardened += [header for header in _ALWAYS if header[0] not in given]
    if given.get(b"content-type", b"").startswith(b"text/html"):
        hardened += [header for header in _PAGES if header[0] not in given]
    return hardened
