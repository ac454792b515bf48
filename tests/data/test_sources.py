import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from rrcm.data import from_pixels, load_images, sources
from rrcm.data.decode import decode
from rrcm.errors import UserError


@pytest.fixture
def load(cache_dir):
    def load_small(path, split="all", image_size=8, channels=3, **options):
        return load_images(
            path, split, image_size=image_size, channels=channels, cache_dir=cache_dir, **options
        )

    return load_small


def picture(value, size=8, mode="RGB"):
    noise = np.random.default_rng(value).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def make_folder(root, splits, images_per_class=3):
    """ROOT/<split>/<class>/<n>.png ("" for no split folder), every image another one."""
    value = 0
    for split in splits:
        for label in ("ant", "bee"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for n in range(images_per_class):
                picture(value := value + 1).save(folder / f"{n}.png")
    return root


def write_parquet(path, features=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(columns, features=features and datasets.Features(features))
    table.to_parquet(path)
    return path


def encoded(count=6, start=0):
    return [{"bytes": png(start + n), "path": None} for n in range(count)]


def png(value):
    picture(value).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


IMAGE = datasets.Image()
INTEGER = datasets.Value("int64")
TEXT = datasets.Value("string")
CLASSES = datasets.ClassLabel(names=["ant", "bee"])
LABELS = [0, 1, 0, 1, 0, 1]


# -- digits --------------------------------------------------------------------------------------


def test_digits():
    from sklearn.datasets import load_digits

    digits = load_images("digits", "all", image_size=8, channels=1)
    bundled = load_digits()
    pixels, labels = digits.batch(torch.arange(1797))
    assert (len(digits), digits.num_classes, digits.class_names[9]) == (1797, 10, "9")
    assert pixels.shape == (1797, 1, 8, 8)
    assert pixels.dtype == torch.uint8
    assert np.array_equal((pixels[:, 0].numpy() / 255 * 16).round(), bundled.images)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.array_equal(labels.numpy(), bundled.target)
    assert torch.equal(digits.image(5), pixels[5])


def test_digits_in_another_shape():
    digits = load_images("digits", "test", image_size=16, channels=3)
    image = digits.image(0)
    assert image.shape == (3, 16, 16)
    assert torch.equal(image[0], image[2])


# -- real sets -----------------------------------------------------------------------------------


def test_cifar10_test_file(real_data, load, cache_dir):
    cifar = load(real_data / "cifar10-jpeg" / "test.parquet", image_size=32)
    assert len(cifar) == 10_000
    assert cifar.class_names[3] == "cat"
    assert cifar.labels.bincount().tolist() == [1000] * 10
    pixels, labels = cifar.batch([0, 9_999, 17])
    assert pixels.shape == (3, 3, 32, 32)
    assert torch.equal(labels, cifar.labels[[0, 9_999, 17]])
    rows = datasets.load_dataset(
        "parquet",
        data_files=str(real_data / "cifar10-jpeg" / "test.parquet"),
        split="train",
        cache_dir=str(cache_dir),
    )
    for row, image in ((0, pixels[0]), (9_999, pixels[1]), (17, cifar.image(17))):
        assert np.array_equal(np.asarray(rows[row]["img"]).transpose(2, 0, 1), image.numpy())
        assert rows[row]["label"] == cifar.labels[row]


def test_cifar10_folder(real_data, load):
    parts = {
        split: load(real_data / "cifar10-jpeg", split, image_size=32)
        for split in ("train", "validation", "test")
    }
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 45_000,
        "validation": 5_000,
        "test": 10_000,
    }
    assert parts["validation"].labels.bincount().tolist() == [500] * 10
    assert parts["test"].note == "test: as published"
    # content, not place: the same on every machine
    assert parts["validation"].fingerprint == "3509e697657feafbe799e0591fc9e2c7"


def test_fashion_mnist_in_gray(real_data, load):
    fashion = load(real_data / "fashion-mnist" / "test.parquet", "test", image_size=28, channels=1)
    assert len(fashion) == 2000
    assert fashion.labels.bincount().tolist() == [200] * 10
    assert fashion.image(3).shape == (1, 28, 28)


@pytest.mark.parametrize("size", [64, 224])
def test_imagenet_folder(real_data, load, size):
    photographs = load(real_data / "imagenet-sample", "test", image_size=size)
    assert (len(photographs), photographs.num_classes) == (200, 1000)
    assert len(photographs.labels.unique()) == 200
    assert photographs.class_names[0] == "n01440764"
    image = photographs.image(150)
    name = photographs.class_names[photographs.labels[150]]
    (file,) = (real_data / "imagenet-sample" / "val" / name).iterdir()
    assert np.array_equal(decode(str(file), size, 3, ""), image.numpy())


# -- folders -------------------------------------------------------------------------------------


def test_folder_with_splits(tmp_path, load):
    root = make_folder(tmp_path / "some [odd] *name", ["train", "val", "test"])
    (root / "train" / "ant" / "notes.txt").write_text("not an image")
    (root / "docs").mkdir()
    for split, folder in (("train", "train"), ("validation", "val"), ("test", "test")):
        images = load(root, split)
        assert images.class_names == ("ant", "bee")
        assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
        for n, label in ((0, "ant"), (4, "bee")):
            wanted = np.asarray(Image.open(root / folder / label / f"{n % 3}.png"))
            assert np.array_equal(images.image(n).permute(1, 2, 0).numpy(), wanted)
    assert sorted(p.name for p in root.iterdir()) == ["docs", "test", "train", "val"]


def test_folder_without_splits_and_mixed_modes(tmp_path, load):
    root = tmp_path / "[odd]"
    for mode, kind in (("RGB", "png"), ("L", "jpg"), ("RGBA", "png"), ("CMYK", "JPEG")):
        for label in ("ant", "bee"):
            folder = root / label
            folder.mkdir(parents=True, exist_ok=True)
            picture(1, size=20, mode=mode).save(folder / f"{mode}.{kind}")
    Image.fromarray(np.full((9, 12), 65535, np.uint16)).save(root / "bee" / "deep.png")
    images = load(root)
    assert images.note == "all: the whole of the only split, 9 images"
    pixels, labels = images.batch(range(9))
    assert pixels.shape == (9, 3, 8, 8)
    assert labels.tolist() == [0] * 4 + [1] * 5
    assert (pixels[8] == 255).all()


def test_folder_of_one_class_has_labels(tmp_path, load):
    (tmp_path / "ant").mkdir()
    picture(1).save(tmp_path / "ant" / "1.png")
    assert load(tmp_path).labels.tolist() == [0]


def test_split_without_class_folders_counts_as_unlabelled(tmp_path, load):
    root = make_folder(tmp_path, ["train", "val"], images_per_class=4)
    (root / "test").mkdir()
    picture(0).save(root / "test" / "0.png")
    assert load(root, "test").note.startswith("test: the published validation split")


def test_corrupt_file_is_named(tmp_path, load):
    root = make_folder(tmp_path, [""])
    broken = root / "bee" / "1.png"
    broken.write_bytes(b"not a picture")
    images = load(root)
    assert images.image(0).shape == (3, 8, 8)
    with pytest.raises(UserError, match="cannot decode .*bee/1.png: not an image file"):
        images.batch([0])


def test_file_gone_since_is_named(tmp_path, load):
    root = make_folder(tmp_path, [""])
    images = load(root)
    (root / "bee" / "1.png").unlink()
    with pytest.raises(UserError, match=r"bee/1\.png"):
        images.image(4)


# -- parquet -------------------------------------------------------------------------------------


def test_parquet_shards_and_integer_labels(tmp_path, load):
    kinds = {"image": IMAGE, "label": INTEGER}
    for shard in range(2):
        name = f"train-0000{shard}-of-00002.parquet"
        write_parquet(
            tmp_path / "data" / name, kinds, image=encoded(start=6 * shard), label=[0, 1, 4] * 2
        )
    write_parquet(tmp_path / "data" / "test.parquet", kinds, image=encoded(), label=LABELS)
    train, test = load(tmp_path, "train"), load(tmp_path, "test")
    assert len(train) == 10
    assert train.class_names == test.class_names == ("0", "1", "2", "3", "4")


def test_parquet_row_that_cannot_be_decoded_is_named(tmp_path, load):
    images = encoded()
    images[4]["bytes"] = b"oops"
    path = write_parquet(
        tmp_path / "x.parquet", {"image": IMAGE, "label": CLASSES}, image=images, label=LABELS
    )
    with pytest.raises(UserError, match=r"cannot decode row 4 of .*x\.parquet"):
        load(path).image(4)


def test_parquet_without_annotation(tmp_path, load):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for cells in (encoded(), [cell["bytes"] for cell in encoded()]):
        table = pa.table({"picture": cells, "labels": LABELS})
        pq.write_table(table, path := tmp_path / "plain.parquet")
        images = load(path)
        assert np.array_equal(images.image(2).permute(1, 2, 0).numpy(), np.asarray(picture(2)))
        assert images.labels.tolist() == LABELS
        path.unlink()


def test_text_labels(tmp_path, load):
    path = write_parquet(
        tmp_path / "x.parquet",
        {"image": IMAGE, "label": TEXT},
        image=encoded(3),
        label=["dog", "cat", "dog"],
    )
    assert load(path).class_names == ("cat", "dog")
    assert load(path).labels.tolist() == [1, 0, 1]


def test_columns_by_name(tmp_path, load):
    path = write_parquet(
        tmp_path / "x.parquet",
        {"left": IMAGE, "right": IMAGE, "kind": CLASSES, "place": CLASSES},
        left=encoded(),
        right=encoded(start=10),
        kind=LABELS,
        place=[0] * 6,
    )
    columns = "left, right, kind, place"
    with pytest.raises(UserError, match=rf"several image columns .left, right.*{columns}"):
        load(path, label_column="kind")
    with pytest.raises(UserError, match=rf"several label columns .kind, place.*{columns}"):
        load(path, image_column="left")
    with pytest.raises(UserError, match=rf"no label column 'knid': its columns are {columns}"):
        load(path, image_column="left", label_column="knid")
    images = load(path, image_column="right", label_column="kind")
    assert images.labels.tolist() == LABELS
    assert np.array_equal(images.image(0).permute(1, 2, 0).numpy(), np.asarray(picture(10)))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (INTEGER, [0, 1, -1, 0, 1, 1], "holds -1, and labels go from 0 to 1"),
        (INTEGER, [0, 1, None, 0, 1, 1], "1 rows have no 'label'"),
        (INTEGER, [-1] * 6, "holds no labels"),
        (datasets.Value("float32"), [0.5] * 6, "not class labels"),
    ],
)
def test_unusable_labels_are_refused(tmp_path, load, kind, values, message):
    path = write_parquet(
        tmp_path / "x.parquet", {"image": IMAGE, "label": kind}, image=encoded(), label=values
    )
    with pytest.raises(UserError, match=message):
        load(path)


def test_test_labels_that_train_does_not_have_are_refused(tmp_path, load):
    kinds = {"image": IMAGE, "label": INTEGER}
    write_parquet(tmp_path / "train.parquet", kinds, image=encoded(), label=LABELS)
    write_parquet(tmp_path / "test.parquet", kinds, image=encoded(), label=[0, 1, 2] * 2)
    with pytest.raises(UserError, match="test: 'label' holds 2, and labels go from 0 to 1"):
        load(tmp_path, "train")


@pytest.mark.parametrize("missing", ["image", "label"])
def test_missing_columns_are_refused(tmp_path, load, missing):
    columns = {"image": encoded(), "label": LABELS, "number": LABELS}
    kinds = {"image": IMAGE, "label": CLASSES, "number": INTEGER}
    del columns[missing], kinds[missing]
    path = write_parquet(tmp_path / "x.parquet", kinds, **columns)
    with pytest.raises(UserError, match=f"no {missing} column: set {missing}_column to one of"):
        load(path)


# -- what is wrong, where, what would be right ----------------------------------------------------


def test_wrong_paths(tmp_path, load):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "broken.parquet").write_text("hello")
    make_folder(tmp_path / "twice", ["val", "validation"])
    write_parquet(tmp_path / "mixed" / "train.parquet", image=[1])
    write_parquet(tmp_path / "mixed" / "other.parquet", image=[1])
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("/no/such/folder", "no such file or folder: /no/such/folder"),
        ("./nowhere", "no such file or folder: ./nowhere"),
        ("cifra10", "unknown data set .*'cifra10': did you mean 'cifar10'"),
        ("nowhere.parquet", "no such file or folder"),
        (tmp_path / "notes.txt", r"notes\.txt is not a \.parquet file"),
        (tmp_path / "broken.parquet", r"broken\.parquet: cannot be read"),
        (tmp_path / "empty", "empty holds no images: expected train.parquet"),
        (tmp_path / "twice", "two validation splits: val"),
        (tmp_path / "mixed", r"other\.parquet: cannot tell its split"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_wrong_settings(load):
    for options, message in (
        ({"channels": 4}, "channels is 4"),
        ({"image_size": 0}, "image_size is 0"),
        ({"split": "tset"}, "unknown split 'tset': did you mean 'test'"),
    ):
        with pytest.raises(UserError, match=message):
            load("digits", **options)


# -- the hub -------------------------------------------------------------------------------------


def test_hub_out_of_reach(monkeypatch, load):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name, hub_id in (("cifar10", "uoft-cs/cifar10"), ("some/where", "some/where")):
        with pytest.raises(UserError, match=f"hub cannot be reached to look for '{hub_id}'") as e:
            load(name, "train")
        assert "\n" not in str(e.value)


def test_hub_without_that_data_set(monkeypatch, load):
    def refuse(**arguments):
        raise datasets.exceptions.DatasetNotFoundError("gated")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match="the Hugging Face hub has no data set 'some/where' open"):
        load("some/where", "train")


def test_imagenet_of_the_hub_has_no_test_labels(monkeypatch, load):
    """The hub's answer, played by a set of its shape: test labels are -1, "extra" is unknown."""
    asked = {}

    def answer(**arguments):
        asked.update(arguments)
        features = datasets.Features({"image": IMAGE, "label": CLASSES})
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_dict(
                    {"image": encoded(), "label": labels}, features=features
                )
                for split, labels in (
                    ("train", LABELS),
                    ("validation", LABELS[::-1]),
                    ("test", [-1] * 6),
                    ("extra", LABELS),
                )
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", answer)
    test = load("imagenet-1k", "test")
    assert asked["path"] == "ILSVRC/imagenet-1k"
    assert test.labels.tolist() == LABELS[::-1]
    assert test.name == "imagenet-1k"
    assert len(load("imagenet-1k", "train")) == 5


# -- ImageSet ------------------------------------------------------------------------------------


def test_large_sets_are_decoded_batch_by_batch(tmp_path, load, monkeypatch):
    root = make_folder(tmp_path, [""])
    small = load(root)
    monkeypatch.setattr(sources, "KEEP_DECODED_BYTES", 10)
    large = load(root)
    (root / "bee" / "2.png").write_bytes(b"broken, and not asked for")
    assert torch.equal(large.batch([4, 0])[0], torch.stack([small.image(4), small.image(0)]))
    with pytest.raises(UserError, match=r"bee/2\.png"):
        large.batch([5])


def test_decoding_over_threads_keeps_the_order(tmp_path, load, monkeypatch):
    root = make_folder(tmp_path, [""], images_per_class=10)
    images = load(root)
    one_by_one = torch.stack([images.image(n) for n in range(20)])
    monkeypatch.setattr(sources, "_CHUNK", 3)
    assert torch.equal(load(root).batch(range(20))[0], one_by_one)


def test_indices_outside_are_refused():
    digits = load_images("digits", "test", image_size=8, channels=1)
    for index in (-1, 360):
        with pytest.raises(IndexError):
            digits.image(index)
        with pytest.raises(IndexError):
            digits.batch([0, index])
    assert digits.batch([])[0].shape == (0, 1, 8, 8)


def test_fingerprint_tells_sets_apart_and_knows_a_copy(tmp_path, load, monkeypatch):
    root = make_folder(tmp_path / "a", [""])
    copy = make_folder(tmp_path / "b", [""])
    for whole in (1 << 20, 0):
        monkeypatch.setattr(sources, "HASH_WHOLE_BYTES", whole)
        first = load(root).fingerprint
        assert load(copy).fingerprint == first
        assert load(root, image_size=9).fingerprint != first
        assert load(root, channels=1).fingerprint != first
        assert load(root, "train").fingerprint != first
    picture(1000).save(copy / "ant" / "0.png")
    assert load(copy).fingerprint != first


def test_from_pixels():
    pixels, labels = torch.zeros(4, 3, 5, 5, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    images = from_pixels(pixels, labels, ["a", "b"], name="toy")
    assert (len(images), images.image_size, images.channels) == (4, 5, 3)
    other = from_pixels(pixels, labels.flip(0), ["a", "b"], name="toy")
    assert images.fingerprint != other.fingerprint
    with pytest.raises(ValueError, match="pixels must be uint8"):
        from_pixels(pixels.float(), labels, ["a", "b"], name="toy")
    with pytest.raises(ValueError, match="labels must be int64"):
        from_pixels(pixels, labels[:3], ["a", "b"], name="toy")
