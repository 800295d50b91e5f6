"""What can be wrong with a bundle.

BundleError
├── BundleMissing        a file (or the whole folder) is not there
├── ManifestInvalid      manifest.json cannot be read as a manifest
├── FormatUnknown        written by a newer format than this reader knows
├── HashMismatch         a file is not the one the manifest was written for
├── EngineMismatch       no engine in the bundle fits this GPU
├── BundleOccupied       the output folder holds something that is not a bundle
└── CanvasError          no canvas holds an image of this size
"""


class BundleError(Exception):
    """Base of everything this package raises; the message names the file, what was expected and what was found."""


class BundleMissing(BundleError):
    """A file of the bundle, or its folder, does not exist."""


class ManifestInvalid(BundleError):
    """manifest.json is not JSON, or not a manifest."""


class FormatUnknown(BundleError):
    """The manifest's format version is not one this reader knows."""


class HashMismatch(BundleError):
    """A file's SHA-256 differs from the manifest's."""


class EngineMismatch(BundleError):
    """The bundle has engines, and none was built for this flavour, architecture and precision."""


class BundleOccupied(BundleError):
    """The place to write to holds files that are no bundle; they are left alone."""


class CanvasError(BundleError):
    """An image is larger than every canvas."""
