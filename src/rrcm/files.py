"""Files that appear whole or not at all."""

import contextlib
import os
from pathlib import Path

from rrcm.errors import UserError


def write_whole(path: str | os.PathLike[str], data: bytes) -> Path:
    """Writes `data` to `path`, whole or not at all; creates the folder if need be.

    Args:
        path: The file; an old one is replaced.
        data: All of its bytes.

    Returns:
        `path`.

    Raises:
        UserError: The folder cannot be created or written, or the disk is full. An old file is
            then as it was before.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(data)
        fsync(draft)
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot write {path}: {reason}; name a folder that can be written, on a disk with room"
        ) from error
    return path


def fsync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share(path: Path) -> None:
    """Gives a file or folder the permissions that a plain `open` or `mkdir` would have given it."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
