"""Bytes of files and folders, to train on."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MOST_BYTES = 64 * 2**20


def read_bytes(data: str, most: int = MOST_BYTES) -> bytes:
    """The first ``most`` bytes of a file, or of the files of a folder in sorted order.

    Args:
        data: path of a file or folder, or "python" for the standard library's ``.py`` files.
            Links inside a folder are not followed; what is not a regular file is left out.
        most: bytes to stop at.

    Raises:
        ValueError: if there are no bytes.
        OSError: for a path that does not exist or cannot be read.
    """
    suffix = None
    if data == "python":
        data, suffix = sysconfig.get_path("stdlib"), ".py"
    if "\0" in data:
        raise ValueError("a path cannot hold a NUL character")
    root = Path(data)
    if root.is_file():
        files: Iterator[Path] = iter([root])
    elif root.is_dir():
        files = _regular_files(root, suffix)
    elif root.exists():
        raise ValueError(f"data {data}: neither a file nor a folder; name one with text")
    else:
        raise FileNotFoundError(
            f"data {data}: no such file or folder; data is digits, copy, mqar, python or a path"
        )
    content = bytearray()
    try:
        for file in files:
            with file.open("rb") as stream:
                content += stream.read(most - len(content))
            if len(content) >= most:
                break
    except OSError as error:
        raise OSError(
            f"data {data}: cannot be read: {error}; check its permissions, or name another path"
        ) from error
    if not content:
        raise ValueError(f"data {data}: no bytes to train on; name a file or folder with text")
    return bytes(content)


def _regular_files(root: Path, suffix: str | None) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=False):
        subfolders[:] = sorted(s for s in subfolders if suffix is None or s != "site-packages")
        for file in sorted(Path(folder, name) for name in names):
            wanted = suffix is None or file.suffix == suffix
            if wanted and not file.is_symlink() and file.is_file():
                yield file
