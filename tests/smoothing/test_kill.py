"""SIGKILL to real runs at many random points: nothing is lost, and nothing is different."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_protocol as protocol

from rrcm.smoothing import (
    Part,
    Shard,
    certify_images,
    journal_settings,
    merge_folder,
    select_indices,
)

KILLS = 40
INDICES = select_indices(2400, stride=20)


def certify(folder: Path, shard: Shard | None = None) -> int:
    """The whole run; the number of rows it had left to do."""
    settings = journal_settings(protocol.classifier(), data="grey", indices=INDICES, **protocol.RUN)
    with Part(folder, settings, shard=shard) as part:
        rows = certify_images(
            protocol.classifier(),
            protocol.image,
            part.todo(),
            part.journal,
            batch_size=100,
            **protocol.RUN,
        )
        done = sum(1 for _ in rows)
        part.finish()
    return done


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_runs(folder: Path, seed: int) -> list[int]:
    """Starts the run and kills it, KILLS times; the lines of the journal after each.

    Some are killed within milliseconds of their start, some after one to three more lines and a
    random while, so that every stage of a row is met.
    """
    random_numbers = random.Random(seed)
    journal = folder / "journal.jsonl"
    lines = []
    for _ in range(KILLS):
        wanted = num_lines(journal) + random_numbers.choice([0, 0, 1, 2, 3])
        child = fork(lambda: certify(folder))
        while num_lines(journal) < wanted:
            time.sleep(0.0005)
        time.sleep(random_numbers.uniform(0, 0.03))
        kill(child)
        lines.append(num_lines(journal))
    return lines


def kill_merges(folder: Path, seed: int) -> list[int]:
    """Kills the merge of two shards KILLS times; how many journals were there after each."""
    random_numbers = random.Random(seed)
    parts = {path: path.read_bytes() for path in folder.iterdir()}
    found = []
    for _ in range(KILLS):
        for path in folder.iterdir():
            path.unlink()
        for path, data in parts.items():
            path.write_bytes(data)
        child = fork(lambda: (merge_folder(folder), time.sleep(60)))
        time.sleep(random_numbers.uniform(0, 0.015))
        kill(child)
        found.append(len(list(folder.glob("journal.*"))))
        whole = folder / "journal.jsonl"
        assert num_lines(whole) in (0, 1 + len(INDICES))
        assert merge_folder(folder) == len(INDICES)
        assert [path.name for path in folder.iterdir()] == ["journal.jsonl"]
    return found


def fork(work) -> int:
    """A process of its own in which torch is there already; importing it takes seconds."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status), "the run ended before it was killed: give it more to do"


def in_a_clean_process(call: str, folder: Path) -> list[int]:
    """Forks are safe only where torch has not started threads, unlike in this process."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r});"
        "import json, pathlib, torch, test_kill as t; torch.set_num_threads(1);"
        f"print(json.dumps(t.{call}(pathlib.Path({str(folder)!r}), seed=7)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("whole")
    assert certify(folder) == len(INDICES)
    return protocol.lines_but_seconds(folder / "journal.jsonl")


def test_a_run_killed_at_40_random_points_ends_as_an_uninterrupted_one(
    uninterrupted: list[str], tmp_path: Path
) -> None:
    lines = in_a_clean_process("kill_runs", tmp_path)
    assert len(lines) == KILLS >= 30
    assert lines == sorted(lines)  # no kill took a row away
    assert len(set(lines)) > KILLS / 3  # and they met the run at many of its stages
    left = certify(tmp_path)
    assert 0 < left == len(uninterrupted) - lines[-1]  # what was done is not done again
    assert protocol.lines_but_seconds(tmp_path / "journal.jsonl") == uninterrupted


def test_a_merge_killed_at_40_random_points_can_be_repeated(
    uninterrupted: list[str], tmp_path: Path
) -> None:
    for index in range(2):
        certify(tmp_path, Shard(index, 2))
    found = in_a_clean_process("kill_merges", tmp_path)
    assert {1, 2} <= set(found)  # before the merge was through, and after it
    assert protocol.lines_but_seconds(tmp_path / "journal.jsonl") == uninterrupted
