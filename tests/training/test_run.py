"""The run's folder: resume, refusal, torn and corrupt files, full disks, signals."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from rrcm.errors import UserError
from rrcm.training import RunFolder, stop_requests


@pytest.fixture
def parts():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}


def train_step(parts):
    parts["optimizer"].zero_grad()
    parts["model"](torch.randn(8, 4)).square().sum().backward()
    parts["optimizer"].step()


def weights(parts):
    return {name: value.clone() for name, value in parts["model"].state_dict().items()}


def test_a_restored_run_continues_bit_for_bit(tmp_path, parts):
    with RunFolder(tmp_path, "pretrain", {"lr": 0.1}) as run:
        train_step(parts)
        run.save(1, parts, best=0.5)
        torch.manual_seed(7)
        train_step(parts)
        wanted = weights(parts)
        assert run.restore(parts) == {"step": 1, "best": 0.5}
        torch.manual_seed(7)
        train_step(parts)
    assert all(torch.equal(value, wanted[name]) for name, value in weights(parts).items())


def test_another_runs_folder_is_refused_with_the_difference(tmp_path):
    with RunFolder(tmp_path, "pretrain", {"pretrain": {"lr": 0.1, "steps": 5}}):
        pass
    with pytest.raises(UserError, match=r"pretrain\.lr is 0\.1 there and 0\.2 here"):
        RunFolder(tmp_path, "pretrain", {"pretrain": {"lr": 0.2, "steps": 5}})
    with pytest.raises(UserError, match="stage is 'pretrain' there and 'finetune' here"):
        RunFolder(tmp_path, "finetune", {"pretrain": {"lr": 0.1, "steps": 5}})


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds files that are not a run's \(thesis\.tex\)"):
        RunFolder(tmp_path, "pretrain", {})
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_second_process_is_refused(tmp_path):
    with RunFolder(tmp_path, "pretrain", {}):
        code = (
            "from pathlib import Path\n"
            "from rrcm.training import RunFolder\n"
            f"RunFolder(Path({str(tmp_path)!r}), 'pretrain', {{}})"
        )
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert second.returncode != 0
    assert "another process is working in this folder" in second.stderr


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write here: Not a directory"):
        RunFolder(tmp_path / "file" / "run", "pretrain", {})


def test_a_corrupt_newest_checkpoint_falls_back(tmp_path, parts):
    with RunFolder(tmp_path, "pretrain", {}) as run:
        run.save(1, parts)
        wanted = weights(parts)
        train_step(parts)
        run.save(2, parts)
        newest = tmp_path / "checkpoints" / "000000002.safetensors"
        newest.write_bytes(newest.read_bytes()[:100])
        with pytest.warns(UserWarning, match="000000002.* falling back"):
            assert run.restore(parts)["step"] == 1
    assert all(torch.equal(value, wanted[name]) for name, value in weights(parts).items())


def test_only_corrupt_checkpoints_are_an_error(tmp_path, parts):
    with RunFolder(tmp_path, "pretrain", {}) as run:
        run.save(1, parts)
        (tmp_path / "checkpoints" / "000000001.safetensors").write_bytes(b"torn")
        with pytest.raises(UserError, match="not a readable checkpoint"):
            run.restore(parts)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, parts):
    other = torch.nn.Linear(5, 3)
    with RunFolder(tmp_path, "pretrain", {}) as run:
        run.save(1, {"model": other})
        with pytest.raises(UserError, match="does not fit this run's model"):
            run.restore({"model": parts["model"]})


def test_only_the_newest_two_checkpoints_are_kept(tmp_path, parts):
    with RunFolder(tmp_path, "pretrain", {}) as run:
        for step in (1, 2, 3):
            run.save(step, parts)
    names = sorted(f.name for f in (tmp_path / "checkpoints").iterdir())
    assert names == ["000000002.safetensors", "000000003.safetensors"]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, parts, monkeypatch):
    with RunFolder(tmp_path, "pretrain", {}) as run:
        run.save(1, parts)

        def full(*_):
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr("rrcm.training.checkpoint.fsync", full)
        with pytest.raises(UserError, match="cannot write the checkpoint: No space left"):
            run.save(2, parts)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["000000001.safetensors"]


def test_log_lines_past_the_checkpoint_are_dropped(tmp_path, parts):
    with RunFolder(tmp_path, "pretrain", {}) as run:
        run.log({"step": 1, "loss": 2.0})
        run.save(1, parts)
        run.log({"step": 2, "loss": 1.0})
        with open(tmp_path / "log.jsonl", "a") as log:
            log.write('{"step": 3, "lo')
        run.restore(parts)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_second_acts(number):
    acted = []
    before = signal.signal(number, lambda *_: acted.append(True))
    try:
        with stop_requests() as stop:
            os.kill(os.getpid(), number)
            assert stop == [number]
            assert not acted
            os.kill(os.getpid(), number)
            assert acted
    finally:
        signal.signal(number, before)
