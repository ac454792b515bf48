"""The journal: whole lines only, one writer, equal settings, and a clear word on anything else."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rrcm.smoothing import Journal, SmoothingError, read_journal

SETTINGS = {"sigma": 0.25, "n": 1000, "model": "abc", "versions": {"torch": "2.13", "rrcm": "0.1"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "journal.jsonl"


def write(path: Path, *indices: int) -> bytes:
    with Journal(path, SETTINGS) as journal:
        for index in indices:
            journal.append({"index": index, "radius": 0.1 * index})
    return path.read_bytes()


def test_rows_come_back_as_written(path: Path) -> None:
    write(path, 20, 0)
    assert write(path, 40).count(b"\n") == 4
    settings, rows = read_journal(path)
    assert settings == SETTINGS
    assert rows == [{"index": i, "radius": 0.1 * i} for i in (20, 0, 40)]
    assert json.loads(path.read_text().splitlines()[0]) == {
        "rrcm_journal": 1,
        "settings": SETTINGS,
    }
    with Journal(path, SETTINGS) as journal:
        assert journal.done == {i: {"index": i, "radius": 0.1 * i} for i in (0, 20, 40)}


def test_a_row_is_in_the_file_as_soon_as_append_returns(path: Path) -> None:
    with Journal(path, SETTINGS) as journal:
        journal.append({"index": 5})
        assert read_journal(path)[1] == [{"index": 5}]
        assert journal.done == {5: {"index": 5}}


def test_settings_compare_as_json_does(path: Path) -> None:
    with Journal(path, {"shape": (3, 32, 32)}):
        pass
    with Journal(path, {"shape": [3, 32, 32]}):
        pass


@pytest.mark.parametrize("kept", [1, 5, 20, -1])
def test_a_torn_last_line_is_dropped_with_a_warning(path: Path, kept: int) -> None:
    whole = write(path, 0, 20)
    line = b'{"index": 40, "radius": 4.0}\n'
    path.write_bytes(whole + line[:kept])
    with pytest.warns(UserWarning, match="line 4, the last one, is torn"):
        assert [row["index"] for row in read_journal(path)[1]] == [0, 20]
    assert path.read_bytes() == whole + line[:kept]  # reading changes nothing
    with pytest.warns(UserWarning, match="line 4, the last one, is torn"):
        journal = Journal(path, SETTINGS)
    with journal:
        assert sorted(journal.done) == [0, 20]
        assert path.read_bytes() == whole
        journal.append({"index": 40, "radius": 4.0})
    assert path.read_bytes() == whole + line


def test_a_garbled_last_line_is_dropped_too(path: Path) -> None:
    """A crash of the machine can leave zeros where a line should be."""
    whole = write(path, 0)
    path.write_bytes(whole + b"\0" * 40 + b"\n")
    with pytest.warns(UserWarning, match="line 3"):
        assert write(path, 20).startswith(whole)
    assert [row["index"] for row in read_journal(path)[1]] == [0, 20]


def test_a_torn_header_is_written_anew(path: Path) -> None:
    header = write(path)
    for kept in (0, 1, 10, 30, len(header) - 1):
        path.write_bytes(header[:kept])
        if kept:
            with pytest.warns(UserWarning, match="line 1"):
                assert write(path) == header
        else:
            assert write(path) == header


def test_other_settings_are_refused_with_the_difference_named(path: Path) -> None:
    before = write(path, 0)
    other = SETTINGS | {"sigma": 0.5, "seed": 1, "versions": {"torch": "2.12", "rrcm": "0.1"}}
    del other["model"]
    with pytest.raises(SmoothingError) as caught:
        Journal(path, other)
    message = str(caught.value)
    assert "sigma is 0.25 there and 0.5 here" in message
    assert "seed is absent there and 1 here" in message
    assert 'model is "abc" there and absent here' in message
    assert 'versions.torch is "2.13" there and "2.12" here' in message
    assert "versions.rrcm" not in message
    assert "n is" not in message
    assert "\n" not in message
    assert path.read_bytes() == before
    write(path, 20)  # the refusal gave up its lock


def test_other_settings_do_not_even_cut_a_torn_line(path: Path) -> None:
    torn = write(path, 0) + b'{"ind'
    path.write_bytes(torn)
    with pytest.warns(UserWarning, match="torn"), pytest.raises(SmoothingError, match="sigma"):
        Journal(path, SETTINGS | {"sigma": 1.0})
    assert path.read_bytes() == torn


@pytest.mark.parametrize("bad", [b'{"index": 20, "rad', b"", b"[1, 2]", b'{"radius": 1}', b"\xff"])
def test_corruption_in_the_middle_is_an_error_with_the_line(path: Path, bad: bytes) -> None:
    lines = write(path, 0, 20, 40).split(b"\n")
    lines[2] = bad
    path.write_bytes(b"\n".join(lines))
    for read in (read_journal, lambda path: Journal(path, SETTINGS)):
        with pytest.raises(SmoothingError, match=r"line 3 of .* is corrupt"):
            read(path)
    assert path.read_bytes() == b"\n".join(lines)


def test_an_image_twice_in_the_file_is_an_error(path: Path) -> None:
    whole = write(path, 0, 20)
    path.write_bytes(whole + b'{"index": 0}\n')
    for read in (read_journal, lambda path: Journal(path, SETTINGS)):
        with pytest.raises(SmoothingError, match=r"image 0 is in .* twice, on lines 2 and 4"):
            read(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"index": 0}, "image 0 is already in"),
        ({"radius": 1.0}, 'whole number under "index", got None'),
        ({"index": "1"}, "got '1'"),
        ({"index": True}, "got True"),
        ({"index": -1}, "got -1"),
        ({"index": 1, "radius": float("nan")}, "JSON cannot hold it"),
        ({"index": 1, "radius": object()}, "JSON cannot hold it"),
    ],
)
def test_bad_rows_are_refused(path: Path, row, message: str) -> None:
    before = write(path, 0)
    with Journal(path, SETTINGS) as journal, pytest.raises(SmoothingError, match=message):
        journal.append(row)
    assert path.read_bytes() == before


def test_a_closed_journal_takes_no_rows(path: Path) -> None:
    with Journal(path, SETTINGS) as journal:
        pass
    journal.close()
    with pytest.raises(SmoothingError, match="is closed"):
        journal.append({"index": 0})


@pytest.mark.parametrize("text", ["idx\tlabel\n0\t3\n", "notes", "{}\n", "[1]\n", '{"a": 1}\n{}\n'])
def test_a_file_of_another_kind_is_left_untouched(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other"
    path.write_text(text)
    with pytest.raises(SmoothingError, match="is not a journal of rrcm"):
        Journal(path, SETTINGS)
    assert path.read_text() == text


def test_a_later_format_is_refused(path: Path) -> None:
    write(path)
    path.write_text('{"rrcm_journal": 2, "settings": {}}\n')
    with pytest.raises(SmoothingError, match="format 2; this version of rrcm reads format 1"):
        read_journal(path)


def test_settings_that_json_cannot_hold(path: Path) -> None:
    with pytest.raises(SmoothingError, match=r"settings of .*: JSON cannot hold it"):
        Journal(path, {"model": object()})
    assert not path.exists()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SmoothingError, match=r"cannot read .*: No such file"):
        read_journal(tmp_path / "none")
    with pytest.raises(SmoothingError, match=r"cannot read .*: Is a directory"):
        read_journal(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(SmoothingError, match="is empty"):
        read_journal(tmp_path / "empty")


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SmoothingError, match=r"cannot open .*file/journal.jsonl for writing"):
        Journal(tmp_path / "file" / "journal.jsonl", SETTINGS)
    with pytest.raises(SmoothingError, match=r"cannot open .*: Is a directory"):
        Journal(tmp_path, SETTINGS)
    with pytest.raises(SmoothingError, match="not a regular file"):
        Journal("/dev/full", SETTINGS)


def test_the_same_process_cannot_open_it_twice(path: Path) -> None:
    with (
        Journal(path, SETTINGS),
        pytest.raises(SmoothingError, match="is being written by another run"),
    ):
        Journal(path, SETTINGS)
    write(path, 0)


def test_a_second_process_is_told_who_is_in_the_way(path: Path) -> None:
    code = f"""
        import sys
        from rrcm.smoothing.journal import Journal
        with Journal({str(path)!r}, {SETTINGS!r}) as journal:
            journal.append({{"index": 0}})
            print("open", flush=True)
            sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(SmoothingError, match="is being written by another run: wait for it"):
            Journal(path, SETTINGS)
        assert read_journal(path)[1] == [{"index": 0}]  # a report may look in meanwhile
        other.communicate()
    write(path, 20)


@pytest.mark.parametrize("taken", [0, 1, 12])
def test_a_full_disk_leaves_no_half_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    """A disk with room for `taken` more bytes takes those, then refuses."""
    before = write(path, 0)
    real_write = os.write
    room = taken

    def full(fd: int, data: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written, room = real_write(fd, data[:room]), 0
        return written

    with Journal(path, SETTINGS) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(
                SmoothingError, match=r"cannot write to .*: No space left on device"
            ):
                journal.append({"index": 20})
        assert path.read_bytes() == before
        assert 20 not in journal.done
        journal.append({"index": 20})  # room again: the same journal goes on
    assert path.read_bytes() == before + b'{"index": 20}\n'


def test_a_failing_sync_or_an_interrupt_takes_the_line_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = write(path, 0)

    def raises(error: BaseException):
        def fsync(fd: int) -> None:
            raise error

        return fsync

    with Journal(path, SETTINGS) as journal:
        monkeypatch.setattr(os, "fsync", raises(OSError(errno.EIO, os.strerror(errno.EIO))))
        with pytest.raises(SmoothingError, match="Input/output error"):
            journal.append({"index": 20})
        monkeypatch.setattr(os, "fsync", raises(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            journal.append({"index": 20})
        assert path.read_bytes() == before
        assert list(journal.done) == [0]


def test_a_real_short_write_leaves_no_half_line(path: Path) -> None:
    """The kernel's own file size limit stands for a full disk: it also takes what fits."""
    before = write(path, 0)
    code = f"""
        import resource
        from rrcm.smoothing.errors import SmoothingError
        from rrcm.smoothing.journal import Journal
        resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before)} + 9, {len(before)} + 9))
        with Journal({str(path)!r}, {SETTINGS!r}) as journal:
            try:
                journal.append({{"index": 20}})
            except SmoothingError as error:
                print(error)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert "cannot write to" in out.stdout
    assert "File too large" in out.stdout
    assert path.read_bytes() == before


def test_a_full_disk_at_the_header_leaves_an_empty_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(SmoothingError, match="No space left"):
            Journal(path, SETTINGS)
    assert path.read_bytes() == b""
    write(path, 0)
    assert len(read_journal(path)[1]) == 1
