"""Figures and files: written, valid, the same each time; and what they show."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from rrcm.errors import UserError
from rrcm.report import accuracy_radius_figure, noise_row_figure, read_results, write_report


def check_files(files, stem):
    assert files == [Path(f"{stem}.png"), Path(f"{stem}.svg")]
    with Image.open(files[0]) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > 600
        assert len(np.unique(np.asarray(image.convert("L")))) > 20  # something is drawn
        assert image.info["dpi"][0] >= 150
    assert ET.parse(files[1]).getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.fixture
def drawn(monkeypatch):
    """The figures saved during the test, to look into."""
    figures = []
    save = Figure.savefig

    def remember(self, *args, **kwargs):
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


def test_the_curve_is_the_exact_step_function(journal, tmp_path, drawn):
    results = read_results(journal())
    check_files(accuracy_radius_figure(results, tmp_path / "acc_0.25"), tmp_path / "acc_0.25")
    (axes,) = drawn[0].axes
    (line,) = axes.lines
    # "pre": a value holds up to and with its radius, so a tie counts.
    assert line.get_drawstyle() == "steps-pre"
    np.testing.assert_array_equal(line.get_xdata(), [0.0, 0.125, 0.25, 0.5, 0.5])
    np.testing.assert_allclose(line.get_ydata(), [60.0, 60.0, 40.0, 20.0, 0.0])
    assert "L2 radius" in axes.get_xlabel()
    assert "[0, 1]" in axes.get_xlabel()
    assert "%" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["σ = 0.25"]
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(94.7, abs=0.1)  # Clopper-Pearson of 3 in 5


def test_envelope_and_names_in_the_figure(journal, tmp_path, drawn, toy_rows):
    journal("runs/net-0.25")
    journal("runs/net-0.5", sigma=0.5)
    journal("runs/other-0.5", sigma=0.5)
    results = read_results(tmp_path / "runs")
    accuracy_radius_figure(results, tmp_path / "figure", envelope=True)
    legend = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert legend == ["best of the sigmas", "net, σ = 0.25", "net, σ = 0.5", "other, σ = 0.5"]
    _, *lines = drawn[0].axes[0].lines
    assert lines[1].get_color() == lines[2].get_color() != lines[0].get_color()
    assert lines[1].get_linestyle() != lines[2].get_linestyle()
    journal("runs/net-0.5", rows=toy_rows[:2], sigma=0.5)
    with pytest.raises(UserError, match="same images"):
        accuracy_radius_figure(read_results(tmp_path / "runs"), tmp_path / "no", envelope=True)
    assert not (tmp_path / "no.png").exists()


def test_all_abstained_still_gives_a_figure(journal, tmp_path, toy_rows):
    for row in toy_rows:
        row.update(prediction=-1, radius=0.0, correct=0)
    results = read_results(journal(rows=toy_rows))
    check_files(accuracy_radius_figure(results, tmp_path / "none"), tmp_path / "none")


@pytest.mark.parametrize("shape", [(6, 6), (1, 6, 6), (3, 6, 6)])
def test_the_picture_row_says_what_is_certified(tmp_path, drawn, shape):
    images = np.random.default_rng(0).random((3, *shape))
    noisy = {0.5: images + 1.0, 0.25: images - 1.0}  # clipped for display
    predictions = {
        0.25: [(0, 0.4199), (1, 0.3), (-1, 0.0)],
        0.5: [(-1, 0.0), (0, 0.2), (1, 0.1)],
    }
    names = ["cat", "a very long class name"]
    files = noise_row_figure(images, noisy, predictions, [0, 0, 1], names, tmp_path / "row")
    check_files(files, tmp_path / "row")
    titles = [axes.get_title() for axes in drawn[0].axes]
    # Rows: clean, then sigma in rising order; a radius is rounded down.
    assert titles[:3] == ["cat", "cat", "a very long …"]
    assert titles[3:6] == ["cat ✓\nradius 0.41", "a very long … ✗\nradius 0.30", "abstains\n"]
    assert titles[6:] == ["abstains\n", "cat ✓\nradius 0.20", "a very long … ✓\nradius 0.10"]
    colours = [axes.title.get_color() for axes in drawn[0].axes[3:6]]
    assert len(set(colours)) == 3
    assert [drawn[0].axes[k].get_ylabel() for k in (0, 3, 6)] == ["clean", "σ = 0.25", "σ = 0.5"]
    shown = [axes.images[0].get_array() for axes in drawn[0].axes]
    assert shown[3].max() == 0.0
    assert shown[6].min() == 1.0
    assert shown[0].shape == ((6, 6, 3) if shape[0] == 3 else (6, 6))


def test_a_picture_row_that_does_not_fit_together_is_refused(tmp_path):
    x = np.zeros((2, 4, 4))
    good = (x, {0.5: x}, {0.5: [(0, 0.1), (-1, 0.0)]}, [0, 1], ["a", "b"])
    for place, value, message in [
        (0, x[:0], "0 images and 2 labels"),
        (1, {0.25: x}, "at the same sigmas"),
        (1, {0.5: x[:1]}, "1 noisy images and 2 predictions for 2 images"),
        (3, [0, 2], "class 2 has no name"),
        (4, ["a"], "class 1 has no name"),
        (0, np.zeros((2, 2, 4, 4)), r"image 0 has the shape \(2, 4, 4\)"),
    ]:
        args = list(good)
        args[place] = value
        with pytest.raises(UserError, match=message):
            noise_row_figure(*args, tmp_path / "row")


def test_a_report_made_again_is_the_same_to_the_byte(journal, tmp_path):
    folder = journal()
    first = write_report(folder, tmp_path / "one")
    again = write_report([folder], tmp_path / "deep" / "two")
    names = ["table.md", "table.csv", "accuracy_radius.png", "accuracy_radius.svg"]
    assert [path.name for path in first.files] == names
    for a, b in zip(first.files, again.files, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(names)


def test_a_report_without_a_folder_writes_nothing(journal, tmp_path):
    folder = journal()
    before = sorted(tmp_path.rglob("*"))
    report = write_report(folder, radii=[0.0, 0.3])
    assert report.files == []
    assert report.table.columns[-1].header == "0.3"
    assert len(report.results) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unwritable_folder_is_one_clear_line(journal, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UserError, match=r"cannot write .*table.md: .*name a folder") as caught:
            write_report(journal(), out)
        assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_old_file_and_no_rest(journal, tmp_path, monkeypatch):
    old = tmp_path / "out" / "accuracy_radius.png"
    old.parent.mkdir()
    old.write_bytes(b"old")

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"accuracy_radius.png: No space left on device"):
        accuracy_radius_figure(read_results(journal()), old.with_suffix(""))
    assert [path.name for path in old.parent.iterdir()] == ["accuracy_radius.png"]
    assert old.read_bytes() == b"old"


def test_importing_the_report_loads_neither_matplotlib_nor_torch():
    code = (
        "import sys, rrcm.report; print([m for m in ('matplotlib', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
