"""Results on disk: one JSON line an image, appended whole or not at all.

The first line is a header with the settings that every row rests on; a row belongs to the journal
only under the same settings. The format:

    {"rrcm_journal": 1, "settings": {"sigma": 0.25, "n": 100000, ...}}
    {"index": 0, "label": 3, "prediction": 3, "radius": 0.61, ...}
    {"index": 20, ...}
"""

import contextlib
import fcntl
import io
import json
import os
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rrcm.smoothing.errors import SmoothingError

FORMAT = 1
"""Version of the journal's format, the value of "rrcm_journal" in the header."""

_ABSENT = object()


class Journal:
    """An append-only file of results, one row an image, which a killed run can go on with.

    Holds a lock on the file while open, so that only one process writes. Use it as a context
    manager.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        """Creates the journal, or reopens one that has the same settings.

        A torn last line, as a kill or a full disk can leave behind, is cut off the file with a
        `UserWarning`; its image counts as not done.

        Args:
            path: The file; its folder is created if need be.
            settings: All that the rows rest on: a mapping that JSON can hold.

        Raises:
            SmoothingError: The file cannot be opened or written, is in use by another process, is
                no journal, is corrupt before its last line, or has other settings (the message
                names them).
        """
        self.path = Path(path)
        self.settings: dict[str, Any] = _json_round_trip(settings, f"settings of {self.path}")
        self._fd = _open_locked(self.path)
        try:
            self.done: dict[int, dict[str, Any]] = self._load()
        except BaseException:
            self.close()
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row, and returns once it is on the disk.

        Args:
            row: Anything JSON can hold, with the image's number under "index".

        Raises:
            SmoothingError: The index is missing or already done, or the disk refuses the line; in
                that case the file is as it was before.
        """
        if self._fd < 0:
            raise SmoothingError(f"{self.path} is closed: open a new Journal to append to it")
        line = _json_round_trip(row, f"row for {self.path}")
        index = line.get("index")
        if type(index) is not int or index < 0:
            raise SmoothingError(f'a row needs a whole number under "index", got {index!r}')
        if index in self.done:
            raise SmoothingError(f"image {index} is already in {self.path}; a row is written once")
        self._write_line(line)
        self.done[index] = line

    def close(self) -> None:
        """Closes the file and gives up the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _load(self) -> dict[int, dict[str, Any]]:
        """Reads what is there, cuts a torn end off, and writes the header of a new file."""
        with open(self._fd, "rb", closefd=False) as file:
            data = file.read()
        settings, rows, whole = _parse(data, self.path)
        phrases = [] if settings is None else differences(settings, self.settings)
        if phrases:
            raise SmoothingError(
                f"{self.path} holds results under other settings: {'; '.join(phrases)}. "
                "Go on with the settings there, or write to another file"
            )
        if whole < len(data):
            self._truncate(whole)
        self._size = whole
        if settings is None:
            self._write_line(header_line(self.settings))
        return {row["index"]: row for row in rows}

    def _write_line(self, line: Mapping[str, Any]) -> None:
        data = json.dumps(line).encode() + b"\n"
        rest = data
        try:
            # One write, but for a disk that fills up: it takes what fits, and the next write tells
            # why no more.
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            os.fsync(self._fd)
        except BaseException as error:
            # Also on Ctrl-C: the file must never hold a row that `done` does not know of.
            self._truncate(self._size)
            if isinstance(error, OSError):
                raise SmoothingError(
                    f"cannot write to {self.path}: {error.strerror}; the results before are kept, "
                    "run again to go on"
                ) from error
            raise
        self._size += len(data)

    def _truncate(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise SmoothingError(
                f"cannot cut the torn last line off {self.path}: {error.strerror}"
            ) from error


def read_journal(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Reads a journal without changing it, also while another process writes it.

    Args:
        path: The file.

    Returns:
        The settings, and the rows in the order of writing. A torn last line is left out with a
        `UserWarning`.

    Raises:
        SmoothingError: The file cannot be read, has no whole header, or is corrupt before its
            last line.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SmoothingError(f"cannot read {path}: {error.strerror}") from error
    settings, rows, _ = _parse(data, path)
    if settings is None:
        raise SmoothingError(f"{path} is empty: it holds no journal yet")
    return settings, rows


def read_rows(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """As `read_journal`, of a file that another process may be making, growing or removing.

    So a missing file or header is no error but gives no settings, and a torn line no warning.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, []
    except OSError as error:
        raise SmoothingError(f"cannot read {path}: {error.strerror}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        settings, rows, _ = _parse(data, path)
    return settings, rows


def header_line(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The first line of a journal."""
    return {"rrcm_journal": FORMAT, "settings": settings}


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is there whole, also after a power cut, or not at all.

    Raises:
        SmoothingError: It cannot be written; what was there before is unchanged.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise SmoothingError(f"cannot write {path}: {error.strerror}") from error


def _open_locked(path: Path) -> int:
    """Opens `path` for appending, creates it if need be, and locks it for this process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Python opens files close-on-exec, so no child program inherits the lock.
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise SmoothingError(f"cannot open {path} for writing: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise SmoothingError(f"{path} is not a regular file, so it cannot hold a journal")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise SmoothingError(
            f"{path} is being written by another run: wait for it, or write to another file"
        ) from None
    except OSError as error:
        os.close(fd)
        raise SmoothingError(f"cannot lock {path}: {error.strerror}") from error
    except SmoothingError:
        os.close(fd)
        raise
    return fd


def _parse(data: bytes, path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]], int]:
    """Settings, rows, and the length in bytes of the whole lines of a journal.

    The settings are None for a file without a whole header: an empty one, or one torn within it.
    """
    settings: dict[str, Any] | None = None
    rows: list[dict[str, Any]] = []
    line_of: dict[int, int] = {}
    whole = 0
    lines = io.BytesIO(data).readlines()
    for number, line in enumerate(lines, start=1):
        last = number == len(lines)
        value = _json_or_none(line) if line.endswith(b"\n") else None
        if number == 1:
            if value is None and last and _may_be_torn_header(line):
                _warn_torn(path, number)
                break
            settings = _checked_header(value, path)
        elif value is None and last:
            _warn_torn(path, number)
            break
        else:
            index = value.get("index") if isinstance(value, dict) else None
            if type(index) is not int or not isinstance(value, dict):
                raise SmoothingError(
                    f"line {number} of {path} is corrupt: it is no JSON object with an index. "
                    "Repair or delete that line, then run again"
                )
            if index in line_of:
                raise SmoothingError(
                    f"image {index} is in {path} twice, on lines {line_of[index]} and {number}: "
                    "delete one of them"
                )
            line_of[index] = number
            rows.append(value)
        whole += len(line)
    return settings, rows, whole


def _json_or_none(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _may_be_torn_header(line: bytes) -> bool:
    """Whether `line` can be the beginning of a header; otherwise the file is someone else's."""
    start = b'{"rrcm_journal": '
    return not line.endswith(b"\n") and (line.startswith(start) or start.startswith(line))


def _checked_header(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict) or "rrcm_journal" not in value:
        raise SmoothingError(
            f"{path} is not a journal of rrcm (its first line is no header); it is left untouched"
        )
    if value["rrcm_journal"] != FORMAT or not isinstance(value.get("settings"), dict):
        raise SmoothingError(
            f"{path} is a journal of format {value['rrcm_journal']!r}; "
            f"this version of rrcm reads format {FORMAT}"
        )
    settings: dict[str, Any] = value["settings"]
    return settings


def _warn_torn(path: Path, number: int) -> None:
    warnings.warn(
        f"{path}: line {number}, the last one, is torn (a run was killed while writing it); "
        "it is dropped",
        stacklevel=4,
    )


def _json_round_trip(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """`value` as JSON gives it back, so that it compares equal to what is read later."""
    try:
        result: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SmoothingError(f"{what}: JSON cannot hold it: {error}") from error
    return result


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One phrase for each setting that differs, nested ones with a dotted name."""
    phrases: list[str] = []
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key, _ABSENT), here.get(key, _ABSENT)
        if isinstance(old, dict) and isinstance(new, dict):
            phrases += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            phrases.append(f"{prefix}{key} is {_shown(old)} there and {_shown(new)} here")
    return phrases


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)
