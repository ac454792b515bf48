"""One run on many processes: real ones, over torch.distributed's store, whole and killed."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import chain
from pathlib import Path

import pytest
import test_protocol as protocol
from torch.distributed import HashStore

from rrcm.smoothing import (
    Journal,
    Part,
    Shard,
    SmoothingError,
    Team,
    certify_images,
    journal_settings,
    merge_folder,
    merge_journals,
)

INDICES = protocol.INDICES[:24]


def settings(**changes: object) -> dict[str, object]:
    given = {"data": "grey", "indices": INDICES, **protocol.RUN, **changes}
    return journal_settings(protocol.classifier(), **given)


def certify_part(folder: Path, limit: int | None = None, **share) -> list[int]:
    """What every process of a run does; the indices it certified."""
    wrote: list[int] = []
    with Part(folder, settings(), **share) as part:
        for row in certify_images(
            protocol.classifier(),
            protocol.image,
            part.todo(),
            part.journal,
            batch_size=100,
            **protocol.RUN,
        ):
            part.count_row()
            wrote.append(row["index"])
            print("row", row["index"], flush=True)
            if len(wrote) == limit:
                return wrote
        part.finish()
    return wrote


def worker(folder: str, pause: str, patience: str) -> None:
    """A process of a team; it sleeps `pause` seconds at every image."""
    image = protocol.image

    def slow_image(index: int):
        time.sleep(float(pause))
        return image(index)

    protocol.image = slow_image
    Team.__init__.__defaults__ = (float(patience),)
    try:
        with Team.from_environment() as team:
            certify_part(Path(folder), team=team)
    except SmoothingError as error:
        sys.exit(f"error: {error}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(folder: Path, pauses: list[float], patience: float = 60) -> list[subprocess.Popen]:
    """The processes of a team, as a launcher without an agent starts them."""
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import test_scaleout as t; "
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, "-c", f"{code}t.worker({str(folder)!r}, '{pause}', '{patience}')"],
            env=os.environ | place | {"RANK": str(rank), "WORLD_SIZE": str(len(pauses))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, pause in enumerate(pauses)
    ]


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, int, str]]:
    """(exit code, rows written, stderr) of each process."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=60)
        found.append((process.returncode, out.count("row "), err))
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The journal of one process, which all others must equal."""
    folder = tmp_path_factory.mktemp("alone")
    assert certify_part(folder) == list(INDICES)
    assert [file.name for file in folder.iterdir()] == ["journal.jsonl"]
    return folder / "journal.jsonl"


def assert_as_alone(folder: Path, alone: Path) -> None:
    assert [file.name for file in folder.iterdir()] == ["journal.jsonl"]
    there = protocol.lines_but_seconds(folder / "journal.jsonl")
    assert there == protocol.lines_but_seconds(alone)
    assert len(there) == 1 + len(INDICES)


@pytest.mark.parametrize("size", [2, 3])
def test_a_team_writes_the_journal_of_one_process(tmp_path: Path, alone: Path, size: int) -> None:
    """The last process is slow, so that the others must take images off it."""
    codes, rows, errors = zip(*ends(start(tmp_path, [0.05] * (size - 1) + [0.5])), strict=True)
    assert set(codes) == {0}, errors
    assert sum(rows) == len(INDICES)
    assert min(rows) > 0
    assert rows[-1] < len(INDICES) / size / 2
    assert_as_alone(tmp_path, alone)


def test_a_killed_workers_images_are_redone_by_a_team_of_another_size(
    tmp_path: Path, alone: Path
) -> None:
    processes = start(tmp_path, [0.1, 0.1, 0.1], patience=4)
    for _ in range(2):
        assert processes[2].stdout.readline().startswith("row ")
    processes[2].send_signal(signal.SIGKILL)
    (code, _, error), (other_code, *_), (killed, *_) = ends(processes)
    assert (code, other_code, killed) == (1, 0, -9)
    message = re.search(
        r"lost the process of rank 2; (\d+) of 24 images are missing .*again", error
    )
    assert message, error
    lost = int(message[1])
    assert 1 <= lost < 10  # the others went on with the queue
    parts = {f"journal.rank-{rank}.jsonl" for rank in range(3)}
    assert {file.name for file in tmp_path.iterdir()} == parts

    # A torn line of a rank that does not come back is no obstacle.
    with (tmp_path / "journal.rank-2.jsonl").open("ab") as file:
        file.write(b'{"index": 40, "la')
    codes, rows, errors = zip(*ends(start(tmp_path, [0.05, 0.05])), strict=True)
    assert set(codes) == {0}, errors
    assert sum(rows) == lost
    assert_as_alone(tmp_path, alone)


def test_the_others_stop_when_the_store_is_gone_and_one_process_finishes(
    tmp_path: Path, alone: Path
) -> None:
    processes = start(tmp_path, [0.2, 0.2])
    assert processes[1].stdout.readline().startswith("row ")
    processes[0].kill()
    (_, (code, _, error)) = ends(processes)
    assert code == 1
    assert "process 1 lost the others" in error
    assert "run the same command again" in error
    assert "Traceback" not in error
    assert 0 < len(certify_part(tmp_path)) < len(INDICES)
    assert_as_alone(tmp_path, alone)


def test_torchrun_and_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rrcm.cli import main  # not above, where every worker would import it

    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def forward(self, images):\n"
        "        mean = images.double().flatten(1).cumsum(dim=1)[:, -1:] / 64\n"
        "        return -((mean - torch.linspace(0.2, 0.4, 10)) ** 2)\n"
        "def model():\n"
        "    return Model()\n"
    )
    command = ["certify", f"{tmp_path}/mine.py:model", "--data", "digits", "--sigma", "0.5"]
    command += ["--image-size", "8", "--channels", "1", "--stride", "40"]
    command += ["--n", "2000", "--precision", "float32", "--device", "cpu", "--out"]

    def rrcm(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rrcm", *arguments])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "--"]
    team = subprocess.run(
        [sys.executable, "-m", *launch, "rrcm.cli", *command, str(tmp_path / "team")],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert team.returncode == 0, team.stderr
    assert team.stdout.count("clean: accuracy") == 1
    assert rrcm(*command, str(tmp_path / "one"))[0] == 0
    for index in range(2):
        code, out, err = rrcm(*command, str(tmp_path / "shards"), "--shard", f"{index}/2")
        assert code == 0, err
        assert f"rrcm merge {tmp_path / 'shards'}" in out
    assert "merged 9 images" in rrcm("merge", str(tmp_path / "shards"))[1]
    journals = [
        protocol.lines_but_seconds(tmp_path / name / "journal.jsonl")
        for name in ("one", "team", "shards")
    ]
    assert journals[0] == journals[1] == journals[2]
    assert len(journals[0]) == 10
    code, _, err = rrcm(*command, str(tmp_path / "other"), "--shard", "2/2")
    assert (code, err.count("\n")) == (2, 1)
    assert "the last one is 1/2" in err
    assert not (tmp_path / "other").exists()


def test_shards_are_merged(tmp_path: Path, alone: Path) -> None:
    assert certify_part(tmp_path, shard=Shard(1, 2)) == list(INDICES[1::2])
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(SmoothingError, match=r"12 of 24 images are missing \(0, 40, 80, 120, 160,"):
        merge_folder(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert len(certify_part(tmp_path, limit=5, shard=Shard(0, 2))) == 5
    assert len(certify_part(tmp_path, shard=Shard(0, 2))) == 7  # a shard resumes
    assert merge_folder(tmp_path) == 24
    assert_as_alone(tmp_path, alone)
    assert merge_folder(tmp_path) == 24  # again, to no effect
    assert_as_alone(tmp_path, alone)


def test_a_lone_process_takes_over_what_shards_left(tmp_path: Path, alone: Path) -> None:
    certify_part(tmp_path, shard=Shard(2, 3))
    certify_part(tmp_path, limit=3)
    assert len(certify_part(tmp_path)) == 16 - 3
    assert_as_alone(tmp_path, alone)


def test_shards_of_every_number_cover_every_image_once() -> None:
    for count in (1, 2, 5, 24, 30):
        shares = [list(Shard(index, count).of(INDICES)) for index in range(count)]
        assert sorted(chain(*shares)) == list(INDICES)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Shard.parse("3/16") == Shard(3, 16)


@pytest.mark.parametrize(
    "text",
    ["", "1", "/", "1/", "/2", "a/2", "-1/2", "1/-2", "0/0", "2/2", "1/2/3", "1.0/2", " 0/2"],
)
def test_bad_shards(text: str) -> None:
    with pytest.raises(SmoothingError, match="shard") as caught:
        Shard.parse(text)
    assert "\n" not in str(caught.value)


def write(path: Path, indices, header=None, **changes: object) -> Path:
    with Journal(path, header or settings()) as journal:
        for index in indices:
            journal.append({"index": index, "radius": 0.5, "seconds": 1.0} | changes)
    return path


def test_rows_that_two_parts_hold_must_agree(tmp_path: Path) -> None:
    first = write(tmp_path / "journal.rank-0.jsonl", INDICES)
    again = write(tmp_path / "journal.rank-1.jsonl", INDICES[:2], seconds=2.0)
    merge_journals([first, again], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == first.read_bytes()
    write(again, INDICES[3:4], radius=0.25)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(SmoothingError, match="image 60 has different results in .*0.jsonl and"):
        merge_folder(tmp_path)
    with pytest.raises(SmoothingError, match="image 60 has different results"):
        Part(tmp_path, settings())
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, "rank-1.jsonl holds .* other settings: seed is 5 there and 4 here"),
        ({"indices": range(3)}, "indices.count is 3 there and 24 here; indices.step is 1 there"),
        ({"versions": {"torch": "1"}}, 'versions.torch is "1" there'),
    ],
)
def test_parts_of_another_run_are_refused(tmp_path: Path, changes, message: str) -> None:
    write(tmp_path / "journal.rank-0.jsonl", INDICES)
    write(tmp_path / "journal.rank-1.jsonl", [], settings(**changes))
    with pytest.raises(SmoothingError, match=message):
        merge_folder(tmp_path)
    with pytest.raises(SmoothingError, match=message):
        Part(tmp_path, settings(), shard=Shard(0, 2))
    assert len(list(tmp_path.iterdir())) == 2


def test_merges_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(SmoothingError, match="holds no journal to merge"):
        merge_folder(tmp_path)
    part = tmp_path / "journal.shard-0-of-1.jsonl"
    part.touch()
    with pytest.raises(SmoothingError, match="nothing was certified"):
        merge_folder(tmp_path)
    write(part, [1])
    with pytest.raises(SmoothingError, match="image 1 in .* is none of this run's"):
        merge_folder(tmp_path)
    part.unlink()
    write(part, [], protocol.settings())
    with pytest.raises(SmoothingError, match="do not say which images"):
        merge_folder(tmp_path)
    part.unlink()
    write(part, INDICES)
    with (
        Journal(tmp_path / "journal.jsonl", settings()),
        pytest.raises(SmoothingError, match="is being written by another run"),
    ):
        merge_folder(tmp_path)
    with pytest.raises(SmoothingError, match=r"cannot write .*: No such file"):
        merge_journals([part], tmp_path / "none" / "out.jsonl")
    assert merge_folder(tmp_path) == 24


def test_a_full_disk_at_the_merge_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "journal.jsonl", INDICES[::2])
    write(tmp_path / "journal.rank-0.jsonl", INDICES[1::2])
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for place, name in ((os, "fsync"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            with pytest.raises(SmoothingError, match="cannot write .*: No space left"):
                merge_folder(tmp_path)
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert merge_folder(tmp_path) == 24


def test_the_header_tells_the_images() -> None:
    assert settings()["indices"] == {"start": 0, "step": 20, "count": 24}
    assert settings(indices=range(5, 6, 7)) == settings(indices=range(5, 6))
    assert protocol.settings()["indices"] is None


def team_of_two(store: HashStore, size: int = 2, patience: float = 60) -> tuple[Team, Team]:
    """Ranks 0 and 1 in this one process, whose second team would otherwise be another run's."""
    one, two = (Team(store, rank, size, patience) for rank in range(2))
    two._prefix = one._prefix
    return one, two


def test_dispatch_gives_every_image_once_and_runs_do_not_mix() -> None:
    store = HashStore()
    for _ in range(2):
        one, two = team_of_two(store)
        with one, two:
            first, second = one.dispatch(INDICES), two.dispatch(INDICES)
            taken = [next(first), next(second), next(second), next(first)]
            assert taken == list(INDICES[:4])
            assert [*second, *first] == list(INDICES[4:])
            assert (one.add_row(), two.add_row(), one.add_row(0)) == (1, 2, 2)


def test_only_a_silent_process_is_given_up() -> None:
    """Rank 1 takes ten times the patience, but beats; rank 2 does not come."""
    one, two = team_of_two(HashStore(), size=3, patience=0.2)
    with one, two:
        late = threading.Timer(2.0, two.finish)
        late.start()
        seen: list[int] = []
        assert one.finish(seen.append) == [2]
        assert not late.is_alive()
        assert seen


def test_a_process_that_leaves_with_an_error_is_not_waited_for() -> None:
    one, two = team_of_two(HashStore())
    two.close()
    with one:
        assert one.finish() == []


def test_ranks_with_other_settings_are_refused_before_the_work(tmp_path: Path) -> None:
    one, two = team_of_two(HashStore())
    with one, two:
        Part(tmp_path, settings(), team=one).close()
        with pytest.raises(SmoothingError, match="rank 0 .* and rank 1 .* differ: seed is 4 there"):
            Part(tmp_path, settings(seed=5), team=two)
        assert [file.name for file in tmp_path.iterdir()] == ["journal.rank-0.jsonl"]
        with pytest.raises(SmoothingError, match="give --shard, or use torchrun"):
            Part(tmp_path, settings(), team=one, shard=Shard(0, 2))


def test_an_incomplete_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Team.from_environment() is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Team.from_environment() is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SmoothingError, match="WORLD_SIZE is set, but .*RANK"):
        Team.from_environment()
