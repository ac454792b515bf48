"""The folder of a training run: what it is, its log, its checkpoints; resumed by the same command.

OUT/run.json          stage and settings; a command that says otherwise is refused
OUT/log.jsonl         one line a logged step
OUT/checkpoints/      the newest two training states
OUT/encoder/ or OUT/classifier/    the result, once the stage is done
"""

import json
import re
import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from types import FrameType
from typing import Any, Self

from rrcm.errors import UserError
from rrcm.files import write_whole
from rrcm.training.checkpoint import Part, load_checkpoint, save_checkpoint

KEPT_CHECKPOINTS = 2
_RUN_FILE = re.compile(r"run\.lock|\.run\.json\..*\.tmp")


class Interrupted(Exception):
    """Ctrl-C or SIGTERM came; the state is saved and the same command carries on."""


class RunFolder:
    """A run's folder, held by this process until the `with` block ends.

    Args:
        path: the folder; made if missing.
        stage: "pretrain" or "finetune".
        settings: everything the result depends on, JSON-able; compared on resume.

    Raises:
        UserError: the folder holds another run or other files, another process has it, or it
            cannot be written.
    """

    def __init__(self, path: Path, stage: str, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._description = path / "run.json"
        wanted = json.loads(json.dumps({"stage": stage, "settings": settings}))
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not self._description.exists():
                # A run killed while it wrote run.json leaves a lock and a draft.
                strangers = [f.name for f in path.iterdir() if not _RUN_FILE.fullmatch(f.name)]
                if strangers:
                    raise UserError(
                        f"{path}: holds files that are not a run's ({min(strangers)}); "
                        "name a new or empty folder"
                    )
            self._lock = open(path / "run.lock", "a")  # noqa: SIM115  held until __exit__
            try:
                flock(self._lock, LOCK_EX | LOCK_NB)
            except OSError:
                raise UserError(f"{path}: another process is working in this folder") from None
            if self._description.exists():
                _refuse_other_run(path, _read_json(self._description), wanted)
            else:
                write_whole(self._description, (json.dumps(wanted, indent=1) + "\n").encode())
        except OSError as error:
            raise UserError(f"{path}: cannot write here: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    def log(self, entry: Mapping[str, Any]) -> None:
        """Appends one line to log.jsonl."""
        line = json.dumps(entry) + "\n"
        try:
            with open(self.path / "log.jsonl", "a") as file:
                file.write(line)
        except OSError as error:
            raise UserError(f"{self.path}: cannot write the log: {error.strerror}") from None

    def save(self, step: int, parts: Mapping[str, Part], **facts: Any) -> None:
        """Saves the training state after `step` steps, and drops all but the newest two."""
        folder = self.path / "checkpoints"
        save_checkpoint(folder / f"{step:09d}.safetensors", parts, {"step": step, **facts})
        for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:
            with suppress(OSError):
                old.unlink()

    def restore(self, parts: Mapping[str, Part]) -> dict[str, Any]:
        """Loads the newest readable checkpoint into the parts; returns its facts, {} if none.

        Falls back to the one before, with a warning, if the newest is unreadable. Log lines of
        steps past the checkpoint are dropped: they will be written again.

        Raises:
            UserError: there are checkpoints, and none can be read.
        """
        checkpoints = self._checkpoints()
        facts: dict[str, Any] = {}
        for path in reversed(checkpoints):
            try:
                facts = load_checkpoint(path, parts)
                break
            except UserError as error:
                if path == checkpoints[0]:
                    raise
                warnings.warn(f"{error}; falling back to the checkpoint before", stacklevel=2)
        self._trim_log(facts.get("step", 0))
        return facts

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("*.safetensors"))

    def _trim_log(self, step: int) -> None:
        log = self.path / "log.jsonl"
        if not log.exists():
            return
        kept = []
        try:
            lines = log.read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise UserError(f"{log}: cannot read the log: {error.strerror}") from None
        for line in lines:
            try:
                if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        if len(kept) < len(lines):
            write_whole(log, b"".join(kept))


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM in a list, so that a loop can save after the current step.

    A second signal of the kind acts as it would have.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    try:
        for number in before:
            signal.signal(number, note)
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path}: is not a run description; name another folder") from None


def _refuse_other_run(path: Path, found: Any, wanted: Mapping[str, Any]) -> None:
    there, here = _flatten(found), _flatten(wanted)
    for key in sorted(there.keys() | here.keys()):
        if there.get(key) != here.get(key):
            raise UserError(
                f"{path}: is another run: {key.removeprefix('settings.')} is "
                f"{there.get(key)!r} there and {here.get(key)!r} here; "
                "use the same settings to carry on, or another folder"
            )


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {prefix: values}
    return {
        name: leaf
        for key, value in values.items()
        for name, leaf in _flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }
