"""Read a `.pth` or `.bin` file without running what it says: tensors, plain values, and argparse's Namespace alone."""

import argparse
import pathlib
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from models.weights import CheckpointError

# Beyond what torch itself allows. Each only stores what it is given; a path of another system becomes a pure path.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    *(
        (cls, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name, cls in (
            ("PosixPath", pathlib.PurePosixPath),
            ("PurePosixPath", pathlib.PurePosixPath),
            ("WindowsPath", pathlib.PureWindowsPath),
            ("PureWindowsPath", pathlib.PureWindowsPath),
        )
    ),
]

_REFUSED = re.compile(r"GLOBAL (\S+) (?:was not an allowed global|whose module)")


def is_pickled(start: bytes) -> bool:
    """Whether a file that starts so is one of torch.save: a zip archive, or a bare pickle as before torch 1.6."""
    return start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))


def read_pickled(path: Path) -> Any:
    """The object in the file. Raises CheckpointError when it is damaged or names anything that would have to be run."""
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of becomes an error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := _REFUSED.search(str(error)):
            raise CheckpointError(
                f"its pickle names {found[1]!r}, which is neither a tensor nor a plain value; nothing of it was run. "
                "Save the weights alone: torch.save({'model': state_dict}, ...)"
            ) from error
        raise CheckpointError(f"its pickle cannot be read ({_reason(error)})") from error
    except Exception as error:  # a damaged file can end the reader in any way, OSError among them
        raise CheckpointError(f"damaged or cut short ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    return re.split(r"\.\s|\n", text)[0] if text else type(error).__name__
