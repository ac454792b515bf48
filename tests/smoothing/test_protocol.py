"""A run over a data set: which images, what a row says, and that a killed run goes on."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rrcm.smoothing import (
    ABSTAIN,
    Journal,
    SmoothedClassifier,
    SmoothingError,
    certify_images,
    journal_settings,
    model_fingerprint,
    read_journal,
    select_indices,
    write_cohen_tsv,
)

RUN = {"n0": 20, "n": 3000, "alpha": 0.001, "seed": 4}
INDICES = select_indices(1000, stride=20)


class ThreeClasses(nn.Module):
    """Class by the mean pixel, in float64 sample by sample: exact at every batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.double().flatten(1)
        mean = pixels.cumsum(dim=1)[:, -1:] / pixels.shape[1]
        return -((mean - self.centres) ** 2)


def image(index: int) -> tuple[Tensor, int]:
    """Grey images, from black to white; the label is wrong for every seventh."""
    grey = (index // 20 * 7 % 50) / 49
    label = 0 if grey < 0.35 else 1 if grey < 0.65 else 2
    return torch.full((1, 8, 8), grey), (label + (index % 7 == 0)) % 3


def classifier() -> SmoothedClassifier:
    return SmoothedClassifier(ThreeClasses().eval(), sigma=0.5, num_classes=3)


def settings() -> dict[str, object]:
    return journal_settings(classifier(), data="grey", **RUN)


def certify_all(path: Path, batch_size: int = 100, indices=INDICES) -> list[dict[str, object]]:
    with Journal(path, settings()) as journal:
        return list(
            certify_images(classifier(), image, indices, journal, batch_size=batch_size, **RUN)
        )


def lines_but_seconds(path: Path) -> list[str]:
    header, *lines = path.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        del row["seconds"]
    return [header, *(json.dumps(row) for row in rows)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "journal.jsonl"
    certify_all(path)
    return path


def test_select_indices() -> None:
    cifar = select_indices(10_000, stride=20)
    assert (len(cifar), cifar[:3], cifar[-1]) == (500, range(0, 60, 20), 9980)
    assert len(select_indices(50_000, stride=100)) == 500
    assert list(select_indices(10, stride=3, start=1)) == [1, 4, 7]
    assert list(select_indices(10_000, stride=20, max_images=3)) == [0, 20, 40]
    assert list(select_indices(2, max_images=9)) == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "total must be at least 1"),
        ((10, 0), "stride must be at least 1"),
        ((10, 1, -1), "start must be at least 0"),
        ((10, 1, 10), "start is 10, but the data set ends at index 9"),
        ((10, 1, 0, 0), "max_images must be at least 1"),
    ],
)
def test_bad_selection(arguments, message: str) -> None:
    with pytest.raises(SmoothingError, match=message):
        select_indices(*arguments)


def test_a_row_says_what_was_found(uninterrupted: Path) -> None:
    header, rows = read_journal(uninterrupted)
    assert [row["index"] for row in rows] == list(INDICES)
    for row in rows:
        x, label = image(row["index"])
        certificate = classifier().certify(
            x, RUN["n0"], RUN["n"], RUN["alpha"], seed=RUN["seed"], index=row["index"]
        )
        for name in ("prediction", "radius", "top", "count", "p_lower"):
            assert row[name] == getattr(certificate, name)
        assert row["label"] == label
        assert row["correct"] == (certificate.prediction == label)
        assert row["clean_prediction"] == classifier().predict_clean(x)
        assert row["seconds"] >= 0
    assert {row["correct"] for row in rows} == {0, 1}
    assert ABSTAIN in {row["prediction"] for row in rows}
    assert header == settings()


def test_the_header_names_what_certificates_rest_on() -> None:
    header = settings()
    assert header["model"] == model_fingerprint(ThreeClasses())
    for name, value in {
        **RUN,
        "sigma": 0.5,
        "data": "grey",
        "dtype": "float32",
        "noise": "gaussian",
        "bound": "clopper-pearson",
        "num_classes": 3,
        "device": "cpu",
    }.items():
        assert header[name] == value
    assert header["versions"]["torch"] == torch.__version__
    assert set(header["versions"]) == {"rrcm", "torch", "numpy", "scipy"}
    assert "batch_size" not in header


def test_neither_batch_size_nor_a_stop_changes_the_rows(
    uninterrupted: Path, tmp_path: Path
) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, settings()) as journal:
        run = certify_images(classifier(), image, INDICES, journal, batch_size=64, **RUN)
        for _ in range(17):
            next(run)
        run.close()
    rest = certify_all(path, batch_size=1000)
    assert [row["index"] for row in rest] == list(INDICES)[17:]  # what is done is not repeated
    assert lines_but_seconds(path) == lines_but_seconds(uninterrupted)
    assert certify_all(path) == []


def test_the_order_of_images_changes_no_row(uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    certify_all(path, indices=[980, 0, 500, 0])
    header, *lines = lines_but_seconds(uninterrupted)
    assert lines_but_seconds(path) == [header, lines[49], lines[0], lines[25]]


def test_another_run_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(uninterrupted.read_bytes())
    model = ThreeClasses()
    with torch.no_grad():
        model.centres[0] += 1e-9
    changed = SmoothedClassifier(model.eval(), 0.5, 3)
    with pytest.raises(SmoothingError, match="other settings: model is"):
        Journal(path, journal_settings(changed, data="grey", **RUN))
    changed = SmoothedClassifier(ThreeClasses().eval(), 0.25, 3, dtype=torch.bfloat16)
    with pytest.raises(SmoothingError, match=r'dtype is "float32" .* sigma is 0.5 there and 0.25'):
        Journal(path, journal_settings(changed, data="grey", **RUN))


@pytest.mark.parametrize(("name", "value"), [("n0", 21), ("n", 3001), ("alpha", 0.01), ("seed", 5)])
def test_a_call_that_contradicts_the_header_is_refused_at_once(
    tmp_path: Path, name: str, value: float
) -> None:
    with Journal(tmp_path / "journal.jsonl", settings()) as journal:
        message = f"opened for {name}={RUN[name]}, but the call says {name}={value}"
        with pytest.raises(SmoothingError, match=message):
            certify_images(classifier(), image, INDICES, journal, **(RUN | {name: value}))
        with pytest.raises(SmoothingError, match=r"sigma=0.5, but the call says sigma=1.0"):
            certify_images(
                SmoothedClassifier(ThreeClasses().eval(), 1.0, 3), image, INDICES, journal, **RUN
            )


@pytest.mark.parametrize(
    ("x", "label", "message"),
    [
        (torch.zeros(1, 8, 8), 3, "image 40 has label 3, but the classifier has classes 0 to 2"),
        (torch.zeros(1, 8, 8), -1, "the label of image 40 must be at least 0, got -1"),
        (torch.zeros(1, 8, 8), 0.5, "the label of image 40 must be a whole number"),
        (torch.full((1, 8, 8), 255.0), 0, r"image 40: an image must have values in \[0, 1\]"),
    ],
)
def test_an_unusable_image_is_named_and_rows_before_it_are_kept(
    tmp_path: Path, x: Tensor, label, message: str
) -> None:
    path = tmp_path / "journal.jsonl"

    def images(index: int) -> tuple[Tensor, int]:
        return (x, label) if index == 40 else image(index)

    with Journal(path, settings()) as journal, pytest.raises(SmoothingError, match=message):
        list(certify_images(classifier(), images, INDICES, journal, **RUN))
    assert [row["index"] for row in read_journal(path)[1]] == [0, 20]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"alpha": 2.0}, "alpha must lie"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings(changes, message: str) -> None:
    with pytest.raises(SmoothingError, match=message):
        journal_settings(classifier(), data="grey", **(RUN | changes))


def test_settings_given_by_hand() -> None:
    header = journal_settings(
        classifier(), data="grey", model="mine", versions={"torch": "0"}, **RUN
    )
    assert header["model"] == "mine"
    assert header["versions"] == {"torch": "0"}


def test_fingerprint_sees_every_part_of_the_weights() -> None:
    def model(**changes: Tensor) -> nn.Module:
        tensors = {"a": torch.arange(6.0), "b": torch.zeros(2, 3), "c": torch.tensor(1)}
        module = nn.Module()
        for name, tensor in (tensors | changes).items():
            module.register_buffer(name, tensor)
        return module

    first = model_fingerprint(model())
    assert first == model_fingerprint(model())
    assert len(first) == 64
    changed = torch.zeros(2, 3)
    changed[1, 2] = 1e-30
    others = [
        model(b=changed),
        model(b=torch.zeros(3, 2)),
        model(b=torch.zeros(2, 3, dtype=torch.bfloat16)),
        model(c=torch.tensor(1, dtype=torch.int32)),
        model(c=torch.tensor([1])),
        model(d=torch.zeros(0)),
        model(a=torch.zeros(2, 3), b=torch.arange(6.0)),
    ]
    assert len({first, *map(model_fingerprint, others)}) == 1 + len(others)


def test_fingerprint_sees_values_not_memory() -> None:
    """A transposed view and its copy are the same weights."""
    module, other = nn.Module(), nn.Module()
    module.register_buffer("a", torch.arange(6.0).reshape(2, 3).T)
    other.register_buffer("a", torch.arange(6.0).reshape(2, 3).T.contiguous())
    assert model_fingerprint(module) == model_fingerprint(other)


def test_fingerprint_of_something_other_than_tensors() -> None:
    class Extra(nn.Module):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    with pytest.raises(
        SmoothingError, match="_extra_state in its state_dict is no tensor but dict"
    ):
        model_fingerprint(Extra())


def test_cohen_tsv_rounds_down_and_sorts(tmp_path: Path) -> None:
    rows = [
        {"index": 20, "label": 7, "prediction": -1, "radius": 0.0, "correct": 0, "seconds": 15.44},
        {"index": 0, "label": 3, "prediction": 3, "radius": 0.68999, "correct": 1, "seconds": 2},
    ]
    path = tmp_path / "log.tsv"
    write_cohen_tsv(rows, path, digits=3)
    assert path.read_text() == (
        "idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.689\t1\t2.0\n20\t7\t-1\t0.000\t0\t15.4\n"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["log.tsv"]


def test_cohen_tsv_of_a_journal(uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    rows = read_journal(uninterrupted)[1]
    write_cohen_tsv(rows, path)
    table = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    assert len(table) == len(rows)
    for (index, label, predict, radius, correct, _), row in zip(table, rows, strict=True):
        assert [int(index), int(label), int(predict), int(correct)] == [
            row[name] for name in ("index", "label", "prediction", "correct")
        ]
        assert row["radius"] - 1e-4 < float(radius) <= row["radius"]


def test_cohen_tsv_errors(tmp_path: Path) -> None:
    with pytest.raises(SmoothingError, match="lacks the column 'radius'"):
        write_cohen_tsv([{"index": 0}], tmp_path / "log.tsv")
    with pytest.raises(SmoothingError, match=r"cannot write .*: No such file"):
        write_cohen_tsv([], tmp_path / "none" / "log.tsv")
    assert list(tmp_path.iterdir()) == []
