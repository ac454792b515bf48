"""One certification run on many processes and machines: a journal each, merged in the end.

Either the processes know each other (`Team`: torchrun, accelerate launch), and each takes the next
image from one queue, so that a slow image holds nobody up; or they do not (`Shard`: job arrays),
and each takes every k-th image. A row is a function of its index, so the merged journal is that of
one process, line for line but for "seconds".
"""

import contextlib
import fcntl
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rrcm.smoothing.checks import check_count
from rrcm.smoothing.errors import SmoothingError
from rrcm.smoothing.journal import Journal, differences, header_line, read_rows, write_whole

JOURNAL = "journal.jsonl"
"""Name of a run's journal in its folder; parts are named journal.rank-1.jsonl and the like."""
JOIN_SECONDS = 600
"""How long the processes of a team wait for one another at the start."""

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_runs = itertools.count()


@dataclass(frozen=True)
class Shard:
    """Every `count`-th image from the `index`-th on: the share of one job of an array."""

    index: int
    count: int

    def __post_init__(self) -> None:
        check_count("shard i/k: k", self.count, 1)
        if not 0 <= check_count("shard i/k: i", self.index, 0) < self.count:
            raise SmoothingError(
                f"shard {self.index}/{self.count}: shards count from 0, so the last one is "
                f"{self.count - 1}/{self.count}"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """The shard that "i/k" names, i from 0 to k - 1.

        Raises:
            SmoothingError: `text` is no such thing.
        """
        index, slash, count = text.partition("/")
        if not (slash and all(p.isascii() and p.isdigit() for p in (index, count))):
            raise SmoothingError(f"shard {text!r}: write i/k with i from 0 to k - 1, such as 0/4")
        return cls(int(index), int(count))

    def of(self, indices: Sequence[int]) -> Sequence[int]:
        """This shard's images; strided, so that shards are alike where images are sorted."""
        return indices[self.index :: self.count]


class Team:
    """The processes of one run, which share a store of torch.distributed.

    Nothing else connects them, so one that dies takes no other along. Use it as a context manager:
    a process that leaves with an error says so, and the others need not wait for it.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    def __init__(self, store: "Store", rank: int, size: int, patience: float = 60.0) -> None:
        """Joins the team; every process of it must come here equally often.

        Args:
            store: A store that all processes reach.
            rank: Number of this process, from 0.
            size: Number of processes.
            patience: Seconds without a sign of life after which a process counts as lost.
        """
        self.rank, self.size, self.patience = rank, size, patience
        # Names of their own for a second run in the same processes, and for workers that torchrun
        # started again, which may find the store of those before them.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._prefix = f"rrcm/{restart}/{size}/{next(_runs)}"
        self._store = store
        self._finished = False
        self._left = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True)
        self._pulse.start()

    @classmethod
    def from_environment(cls) -> Self | None:
        """The team that torchrun or accelerate launch started this process for; None if none.

        Returns once all processes are there.

        Raises:
            SmoothingError: The environment is incomplete, or a process does not come.
        """
        environment = os.environ
        if environment.get("WORLD_SIZE", "1") == "1":
            return None
        try:
            size, rank = int(environment["WORLD_SIZE"]), int(environment["RANK"])
            host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        except (KeyError, ValueError) as error:
            raise SmoothingError(
                f"WORLD_SIZE is set, but the rest of a torchrun environment is not ({error}): "
                "start with torchrun or accelerate launch, or unset WORLD_SIZE"
            ) from None
        # Under torchrun its agent hosts the store, otherwise rank 0 does.
        hosts = rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            # Here, as there are builds of torch without it.
            from torch.distributed import TCPStore  # type: ignore[attr-defined]

            wait = timedelta(seconds=JOIN_SECONDS)
            store = TCPStore(host, port, size, hosts, wait, multi_tenant=True)
        except (RuntimeError, ValueError) as error:
            raise SmoothingError(
                f"process {rank} of {size} found no store at {host}:{port}, or not all came in "
                f"{JOIN_SECONDS} s: {_first_line(error)}"
            ) from error
        return cls(store, rank, size)

    def dispatch(self, indices: Sequence[int]) -> Iterator[int]:
        """Takes one image after the other from the queue that all processes share.

        Args:
            indices: The queue: the same in every process.

        Yields:
            Indices that no other process got.

        Raises:
            SmoothingError: The store is gone.
        """
        while (position := self._add("next", 1) - 1) < len(indices):
            yield indices[position]

    def from_first(self, name: str, value: str) -> str:
        """What rank 0 calls `name`: its own `value` there, and elsewhere once it is known.

        Raises:
            SmoothingError: Rank 0 is gone.
        """
        key = f"{self._prefix}/{name}"
        with self._errors():
            if self.rank == 0:
                self._store.set(key, value)
                return value
            started = time.monotonic()
            while not self._store.check([key]):
                if time.monotonic() - started > JOIN_SECONDS:
                    raise SmoothingError(f"rank 0 did not tell its {name} in {JOIN_SECONDS} s")
                time.sleep(0.05)
            return str(self._store.get(key).decode())

    def add_row(self, rows: int = 1) -> int:
        """Counts rows that this process wrote; how many all have written since they started."""
        return self._add("rows", rows)

    def finish(self, watch: Callable[[int], None] | None = None) -> list[int]:
        """Says that this process has closed its journal; rank 0 waits for all others.

        Args:
            watch: Called with `add_row(0)` while rank 0 waits.

        Returns:
            The ranks that gave no sign of life for `patience` seconds; always none but on rank 0.

        Raises:
            SmoothingError: The store is gone.
        """
        self._say_finished()
        lost: list[int] = []
        if self.rank:
            return lost
        beats = dict.fromkeys(range(1, self.size), (-1, time.monotonic()))
        while beats:
            for rank, (count, since) in list(beats.items()):
                if self._add(f"finished/{rank}", 0):
                    del beats[rank]
                elif (now_at := self._add(f"beat/{rank}", 0)) != count:
                    beats[rank] = now_at, time.monotonic()
                elif time.monotonic() - since > self.patience:
                    lost.append(rank)
                    del beats[rank]
            if watch:
                watch(self.add_row(0))
            if beats:
                time.sleep(min(0.1, self.patience / 10))
        return lost

    def close(self) -> None:
        """Leaves the team, finished or not."""
        if self._left.is_set():
            return
        self._left.set()
        self._pulse.join()
        with contextlib.suppress(SmoothingError):
            self._say_finished()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _beat(self) -> None:
        # The main thread meets a lost store by itself.
        with contextlib.suppress(RuntimeError):
            while not self._left.wait(self.patience / 10):
                self._store.add(f"{self._prefix}/beat/{self.rank}", 1)

    def _say_finished(self) -> None:
        # Once: after it, rank 0 may have left, and with it the store.
        if not self._finished:
            self._finished = True
            self._add(f"finished/{self.rank}", 1)

    def _add(self, name: str, amount: int) -> int:
        with self._errors():
            return int(self._store.add(f"{self._prefix}/{name}", amount))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except SmoothingError:
            raise
        except RuntimeError as error:
            raise SmoothingError(
                f"process {self.rank} lost the others ({_first_line(error)}); what is done is "
                "kept, run the same command again"
            ) from error


class Part:
    """This process's share of a run: which images are left for it, and the journal it writes.

    Attributes:
        journal: Where the rows go: journal.jsonl of a lone process, otherwise one of its own, with
            the same header.
        done: How many images of the run are done, by whomever.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: Mapping[str, Any],
        *,
        shard: Shard | None = None,
        team: Team | None = None,
    ) -> None:
        """Opens the journal, and reads what others have left in the folder.

        Args:
            folder: The run's folder, which all processes see.
            settings: `journal_settings` with the run's `indices`.
            shard: The share of this process.
            team: The processes to share with.

        Raises:
            SmoothingError: Both a shard and a team are given, rank 0 or a journal in the folder
                has other settings, or a journal cannot be read or written.
        """
        if shard and team:
            raise SmoothingError("a shard is for one process: give --shard, or use torchrun")
        self.folder = Path(folder)
        self.indices = indices_of(settings)
        self._shard, self._team = shard, team
        if team:
            first = json.loads(team.from_first("settings", json.dumps(dict(settings))))
            phrases = differences(first, json.loads(json.dumps(dict(settings))))
            if phrases:
                raise SmoothingError(
                    f"rank 0 (there) and rank {team.rank} (here) differ: {'; '.join(phrases)}"
                )
        path = self.folder / JOURNAL
        if shard:
            path = self.folder / f"journal.shard-{shard.index}-of-{shard.count}.jsonl"
        elif team:
            path = self._path_of_rank(team.rank)
        # Before the own file is made, so that a refusal leaves nothing behind.
        others = [other for other in journals_in(self.folder) if other != path]
        self._elsewhere = _rows_by_index(others, settings)
        self.journal = Journal(path, settings)
        known = self._elsewhere.keys() | self.journal.done.keys()
        self.done = self._done_before = sum(index in known for index in self.indices)

    def todo(self) -> Iterator[int]:
        """The images left for this process, taken one by one as they are asked for."""
        order: Iterable[int] = self.indices
        if self._shard:
            order = self._shard.of(self.indices)
        elif self._team:
            order = self._team.dispatch(self.indices)
        return (index for index in order if index not in self._elsewhere)

    def count_row(self) -> None:
        """Takes note that this process has written a row."""
        if self._team:
            # Without the store there is no next image, which `todo` tells once those under way
            # are done; only the figure is missing until then.
            with contextlib.suppress(SmoothingError):
                self._set_done(self._team.add_row())
        else:
            self.done += 1

    def finish(self, watch: Callable[[int], None] | None = None) -> None:
        """Closes the journal, and merges all journals of the folder where that is up to this one.

        That is: to a lone process that found parts, and to rank 0 of a team, once the others have
        closed theirs. A shard leaves it to `merge_folder`.

        Args:
            watch: Called with `done` while rank 0 waits.

        Raises:
            SmoothingError: Images are missing, as a process was lost; or as `merge_folder`.
        """
        self.close()
        lost: list[int] = []
        if self._team:

            def tell(rows: int) -> None:
                self._set_done(rows)
                if watch:
                    watch(self.done)

            lost = self._team.finish(tell)
            if self._team.rank:
                return
        paths = journals_in(self.folder)
        if self._team:
            # By name, too: a network file system may list the parts of other machines only later.
            paths += map(self._path_of_rank, range(self._team.size))
        if self._shard or paths == [self.folder / JOURNAL]:
            return
        try:
            _merge(self.folder, paths)
        except SmoothingError as error:
            if lost:
                ranks = ", ".join(map(str, lost))
                raise SmoothingError(f"lost the process of rank {ranks}; {error}") from error
            raise

    def close(self) -> None:
        """Closes the journal."""
        self.journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _path_of_rank(self, rank: int) -> Path:
        return self.folder / f"journal.rank-{rank}.jsonl"

    def _set_done(self, rows: int) -> None:
        # A process that started late has found some of the rows in the folder already.
        self.done = min(self._done_before + rows, len(self.indices))


def indices_of(settings: Mapping[str, Any]) -> range:
    """The images of a run, as the settings in its journal's header tell them.

    Raises:
        SmoothingError: They do not.
    """
    told = settings.get("indices")
    if not told:
        raise SmoothingError(
            "the settings do not say which images the run is for: give `indices` to "
            "journal_settings"
        )
    start, step, count = (told[name] for name in ("start", "step", "count"))
    return range(start, start + step * count, step)


def journals_in(folder: Path) -> list[Path]:
    """The journals of a run: parts of ranks and of shards, then journal.jsonl."""
    parts = [path for kind in ("rank", "shard") for path in folder.glob(f"journal.{kind}-*.jsonl")]
    whole = folder / JOURNAL
    return sorted(parts) + [whole] * whole.exists()


def merge_folder(folder: str | os.PathLike[str]) -> int:
    """Merges the journals of a run into its journal.jsonl, and removes the parts.

    Args:
        folder: The run's folder.

    Returns:
        The number of rows.

    Raises:
        SmoothingError: There are none, or as `merge_journals`; the folder is as it was.
    """
    paths = journals_in(Path(folder))
    if not paths:
        raise SmoothingError(f"{folder} holds no journal to merge")
    return _merge(Path(folder), paths)


def _merge(folder: Path, paths: Sequence[Path]) -> int:
    out = folder / JOURNAL
    rows = merge_journals(paths, out)
    # Drafts are what merges leave behind that were killed.
    for path in (*paths, *folder.glob(f".{JOURNAL}.*.tmp")):
        if path != out:
            path.unlink(missing_ok=True)
    return rows


def merge_journals(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> int:
    """Merges journals of one run into one, sorted in the order of the run's images.

    Args:
        paths: Journals with equal headers, which together hold every image of the run.
        out: The file to write, whole or not at all; it may be one of `paths`.

    Returns:
        The number of rows.

    Raises:
        SmoothingError: A journal cannot be read or has another header (the message names the
            difference), an image has two different results, images are missing, or `out` is in
            use or cannot be written.
    """
    out = Path(out)
    with _locked(out):
        settings = None
        for path in map(Path, paths):
            settings = settings or read_rows(path)[0]
        if settings is None:
            raise SmoothingError("no journal to merge has a header yet: nothing was certified")
        rows = _rows_by_index(list(map(Path, paths)), settings)
        indices = indices_of(settings)
        missing = [index for index in indices if index not in rows]
        if missing:
            some = ", ".join(map(str, missing[:5])) + ", ..." * (len(missing) > 5)
            raise SmoothingError(
                f"{len(missing)} of {len(indices)} images are missing ({some}): run the same "
                "command again, or the shards that did not finish"
            )
        lines = [header_line(settings), *(rows[index] for index in indices)]
        write_whole(out, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    return len(indices)


def _rows_by_index(paths: Sequence[Path], settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The rows of all journals, which must have these settings and agree but for "seconds"."""
    here = json.loads(json.dumps(dict(settings)))
    indices = indices_of(settings)
    rows: dict[int, dict[str, Any]] = {}
    origin: dict[int, Path] = {}
    for path in paths:
        there, found = read_rows(path)
        phrases = differences(there, here) if there is not None else []
        if phrases:
            raise SmoothingError(f"{path} holds results under other settings: {'; '.join(phrases)}")
        for row in found:
            index = row["index"]
            if index not in indices:
                raise SmoothingError(f"image {index} in {path} is none of this run's images")
            if index in rows and _but_seconds(rows[index]) != _but_seconds(row):
                raise SmoothingError(
                    f"image {index} has different results in {origin[index]} and {path}: find "
                    "out why, then delete one of the two rows"
                )
            rows.setdefault(index, row)
            origin.setdefault(index, path)
    return rows


def _but_seconds(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "seconds"}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock of a journal, if there is one, against a process that still writes it."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield
        return
    except OSError as error:
        raise SmoothingError(f"cannot open {path} for writing: {error.strerror}") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SmoothingError(
                f"{path} is being written by another run: wait for it, then merge"
            ) from None
        yield
    finally:
        os.close(fd)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
