"""Where images come from: bundled digits, the Hugging Face hub, parquet files, image folders.

Every source becomes an `ImageSet`: one split, uint8 pixels of one size, integer labels. How the
splits are made is in `rrcm.data.splits`, how a file becomes pixels in `rrcm.data.decode`.
"""

import dataclasses
import functools
import glob
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rrcm.data.decode import decode, fit
from rrcm.data.names import unknown_name
from rrcm.data.splits import SYNONYMS, check_split, choose_split
from rrcm.errors import UserError

HUB_IDS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
    "imagenet-1k": "ILSVRC/imagenet-1k",
}
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")

# Sets up to this size are decoded once and kept; larger ones are decoded batch by batch.
KEEP_DECODED_BYTES = 1 << 30
# Sets up to this size are fingerprinted by all their bytes; larger ones by sizes and a sample.
HASH_WHOLE_BYTES = 256 << 20
_HASHED_SAMPLE = 256
_CHUNK = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """One split of a set of images: pixels of one size, and labels.

    Build one with `load_images` or `from_pixels`.
    """

    name: str
    """A known name ("digits", "cifar10"), a hub id or the path, as the user gave it."""
    split: str
    """ "train", "validation", "test" or "all"."""
    class_names: tuple[str, ...]
    labels: Tensor
    """int64 [N], values 0..num_classes-1."""
    note: str
    """One line: how the split was made."""
    image_size: int
    channels: int
    _read: Callable[[Sequence[int]], Tensor]
    """indices -> uint8 [B, C, H, W]."""
    _hash_content: Callable[[Callable[[bytes], None]], None]
    """Feeds what identifies the images, in order, to the update function of a hash."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def image(self, index: int) -> Tensor:
        """Return one image, uint8 [C, H, W], decoding no other.

        Raises:
            IndexError: index outside 0..N-1.
            UserError: the file cannot be decoded; the message names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)} in {self.name}, {self.split}")
        return self._decoded[index] if "_decoded" in self.__dict__ else self._read([index])[0]

    def batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return (images uint8 [B, C, H, W], labels int64 [B]), both on the CPU.

        The first call decodes the whole set where it fits in KEEP_DECODED_BYTES.

        Raises:
            IndexError: an index outside 0..N-1.
            UserError: a file cannot be decoded; the message names it.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(self):
            raise IndexError(f"index outside 0..{len(self) - 1} in {self.name}, {self.split}")
        if len(self) * self.channels * self.image_size**2 <= KEEP_DECODED_BYTES:
            pixels = self._decoded[chosen]
        else:
            pixels = self._read(chosen.tolist())
        return pixels, self.labels[chosen]

    @functools.cached_property
    def _decoded(self) -> Tensor:
        return self._read(range(len(self)))

    @functools.cached_property
    def fingerprint(self) -> str:
        """32 hex digits naming these images, in this order, at this size, with these labels.

        Sets up to HASH_WHOLE_BYTES (encoded) count with every byte; larger ones with the size and
        file name of every image and all bytes of 256 of them. The place on disk does not count.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.class_names, self.channels, self.image_size)).encode())
        digest.update(self.labels.numpy().astype("<i8").tobytes())
        self._hash_content(digest.update)
        return digest.hexdigest()


def from_pixels(
    pixels: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    *,
    name: str,
    split: str = "all",
    note: str = "made in memory",
) -> ImageSet:
    """Make an ImageSet of images in memory.

    Args:
        pixels: uint8 [N, C, S, S].
        labels: int64 [N], values 0..len(class_names)-1.
        class_names: one a class.
        name: what reports call the set.
        split: what reports call the split.
        note: one line saying how the split was made.

    Raises:
        ValueError: shapes or types other than those above.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[2] != pixels.shape[3]:
        raise ValueError(f"pixels must be uint8 [N, C, S, S], got {pixels.dtype} {[*pixels.shape]}")
    if labels.dtype != torch.int64 or labels.shape != pixels.shape[:1]:
        raise ValueError(
            f"labels must be int64 [{len(pixels)}], got {labels.dtype} {[*labels.shape]}"
        )
    return ImageSet(
        name=name,
        split=split,
        class_names=tuple(class_names),
        labels=labels,
        note=note,
        image_size=pixels.shape[2],
        channels=pixels.shape[1],
        _read=lambda indices: pixels[torch.as_tensor(indices)],
        _hash_content=lambda update: update(pixels.numpy().tobytes()),
    )


def load_images(
    name_or_path: str | os.PathLike[str],
    split: str,
    *,
    image_size: int,
    channels: int,
    image_column: str | None = None,
    label_column: str | None = None,
    config: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> ImageSet:
    """Load one split of an image classification set.

    `name_or_path` is tried in this order:

    1. "digits": the 1,797 handwritten digits that come with scikit-learn, gray, 8x8;
    2. a path that exists: a .parquet file; a folder of parquet files (train.parquet,
       test-00000-of-00002.parquet, ..., in it or in its `data/`); or a folder of images,
       PATH/<split>/<class>/* or PATH/<class>/*;
    3. a name in HUB_IDS, such as "cifar10", or any "owner/name" on the Hugging Face hub.

    Splits do not depend on the run's seed: see `rrcm.data.splits`. Labels without class names are
    named by their numbers, and train's largest label says how many there are. The Arrow copy that
    `datasets` makes goes to its own cache, never into the user's folder.

    Args:
        name_or_path: see above.
        split: "train", "validation", "test", or "all" (sources of one split only).
        image_size: height and width; other sizes are resized and centre cropped.
        channels: 1 (gray) or 3 (RGB).
        image_column: the column of images, if it cannot be told from the types.
        label_column: the column of labels (class label, integer or text), likewise.
        config: the hub dataset's configuration, where it has several.
        cache_dir: in place of the cache of `datasets` (~/.cache/huggingface/datasets).

    Raises:
        UserError: nothing of that name, hub out of reach, no such split or column, ambiguous
            columns, unusable labels.
    """
    check_split(split)
    if channels not in (1, 3):
        raise UserError(f"channels is {channels}: images are read as 1 (gray) or 3 (RGB)")
    if image_size < 1:
        raise UserError(f"image_size is {image_size}: it must be at least 1")
    name = os.fspath(name_or_path)
    if name == "digits":
        return _load_digits(split, image_size, channels)
    published = _read_source(name, config, cache_dir)
    image_column, label_column = _find_columns(published, name, image_column, label_column)
    labels, class_names = _read_labels(published, name, label_column)
    source, indices, note = choose_split(labels, split, name)
    files = _EncodedImages(published[source], image_column, indices, f"{name}, {source}")
    return ImageSet(
        name=name,
        split=split,
        class_names=class_names,
        labels=torch.from_numpy(labels[source][indices]),
        note=note,
        image_size=image_size,
        channels=channels,
        _read=functools.partial(files.read, image_size=image_size, channels=channels),
        _hash_content=files.hash_content,
    )


def _load_digits(split: str, image_size: int, channels: int) -> ImageSet:
    """The test set of the UCI optical digits (Alpaydin and Kaynak, 1998), values 0..16."""
    from PIL import Image
    from sklearn.datasets import load_digits

    bundled = load_digits()
    labels = bundled.target.astype(np.int64)
    _, indices, note = choose_split({"digits": labels}, split, "digits")
    gray = np.rint(bundled.images[indices] * (255 / 16)).astype(np.uint8)
    pixels = torch.from_numpy(np.stack([fit(Image.fromarray(image), image_size) for image in gray]))
    return from_pixels(
        pixels.expand(-1, channels, -1, -1).contiguous(),
        torch.from_numpy(labels[indices]),
        [str(digit) for digit in range(10)],
        name="digits",
        split=split,
        note=note,
    )


def _read_source(
    name: str, config: str | None, cache_dir: str | os.PathLike[str] | None
) -> dict[str, Any]:
    """Return published split -> datasets.Dataset, through the reader that fits the source."""
    path = Path(name).expanduser()
    if path.exists():
        builder, data_files = _find_files(path)
        hub_id = None
        arguments: dict[str, Any] = {"path": builder, "data_files": data_files}
        if builder == "imagefolder":
            arguments["drop_labels"] = False  # else a folder of one class comes without labels
    else:
        hub_id = HUB_IDS.get(name.lower(), name)
        # A bare word may be an old-style hub name, but is far likelier a slip of the pen.
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", hub_id):
            looks_like_path = "/" in name or os.sep in name or name.startswith((".", "~"))
            if looks_like_path or name.endswith(".parquet"):
                raise UserError(f"no such file or folder: {name}")
            raise unknown_name(
                "data set (no such path, and a hub id is written owner/name)",
                name,
                ["digits", *HUB_IDS],
            )
        arguments = {"path": hub_id, "name": config}

    import datasets

    try:
        found = datasets.load_dataset(
            **arguments, cache_dir=None if cache_dir is None else os.fspath(cache_dir)
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"{name}: no such path, and the Hugging Face hub has no data set {hub_id!r} open to "
            "you; check the name, or for a gated one accept its terms and run `hf auth login`"
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise UserError(
            f"{name}: no such path, and the Hugging Face hub cannot be reached to look for "
            f"{hub_id!r}; check the network, or give the path of a local copy"
        ) from error
    except Exception as error:  # every reader of `datasets` has its own exceptions
        reason = f"{error.__cause__ or error}".strip().partition("\n")[0]
        raise UserError(f"{name}: cannot be read: {reason}") from error
    return _known_splits(dict(found), name)


def _known_splits(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Rename splits to our names; drop others (SVHN's "extra") unless there is just one split."""
    if len(found) == 1:
        return found
    known: dict[str, Any] = {}
    for split, rows in found.items():
        ours = SYNONYMS.get(split)
        if ours in known:
            raise UserError(f"{name} has two {ours} splits: {', '.join(sorted(found))}")
        if ours:
            known[ours] = rows
    if not known:
        raise UserError(
            f"{name} has the splits {', '.join(sorted(found))}: none is called train, validation "
            "or test"
        )
    return known


def _find_files(path: Path) -> tuple[str, dict[str, list[str]]]:
    """Return (builder of `datasets`, split -> file patterns) for a local path."""
    if path.is_file():
        if path.suffix != ".parquet":
            raise UserError(f"{path} is not a .parquet file: give one, or a folder")
        return "parquet", {"train": [glob.escape(str(path))]}
    for folder in (path, path / "data"):
        if parquet := sorted(folder.glob("*.parquet")):
            return "parquet", _parquet_splits(parquet)
    folders = sorted(
        entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    # A split's folder without class folders (ImageNet's public test) has no labels: left out.
    splits = {
        folder.name: [glob.escape(str(folder)) + "/*/*"]
        for folder in folders
        if folder.name in SYNONYMS and _has_image(folder, "*/*")
    }
    if splits:
        return "imagefolder", splits
    if any(_has_image(folder, "*") for folder in folders):
        return "imagefolder", {"train": [glob.escape(str(path)) + "/*/*"]}
    raise UserError(
        f"{path} holds no images: expected train.parquet and test.parquet, or image files in "
        f"{path}/<split>/<class>/ or {path}/<class>/"
    )


def _has_image(folder: Path, pattern: str) -> bool:
    from PIL import Image

    extensions = Image.registered_extensions()
    return any(file.suffix.lower() in extensions for file in folder.glob(pattern))


def _parquet_splits(files: list[Path]) -> dict[str, list[str]]:
    """Sort files into splits by the first word of their names."""
    splits: dict[str, list[str]] = {}
    unnamed = []
    for file in files:
        split = SYNONYMS.get(re.split(r"[-_.]", file.name)[0])
        if split is None:
            unnamed.append(file.name)
        else:
            splits.setdefault(split, []).append(glob.escape(str(file)))
    if not splits:
        return {"train": [glob.escape(str(file)) for file in files]}
    if unnamed:
        raise UserError(
            f"{files[0].parent / unnamed[0]}: cannot tell its split; name it train-, validation- "
            "or test-*.parquet, as the files beside it, or move it away"
        )
    return splits


def _find_columns(
    published: dict[str, Any], name: str, image_column: str | None, label_column: str | None
) -> tuple[str, str]:
    from datasets import ClassLabel, Image, Value

    features = next(iter(published.values())).features
    columns = ", ".join(features)
    for rows in published.values():
        if set(rows.features) != set(features):
            raise UserError(
                f"{name}: the splits have different columns: {columns}; {', '.join(rows.features)}"
            )
    for kind, given in (("image", image_column), ("label", label_column)):
        if given is not None and given not in features:
            raise UserError(f"{name} has no {kind} column {given!r}: its columns are {columns}")

    if image_column is None:
        images = [
            column
            for column, feature in features.items()
            # files written without `datasets` have the storage but not the annotation
            if isinstance(feature, Image)
            or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
            or feature == Value("binary")
        ]
        if len(images) != 1:
            found = f"several image columns ({', '.join(images)})" if images else "no image column"
            raise UserError(f"{name} has {found}: set image_column to one of {columns}")
        image_column = images[0]

    if label_column is None:
        named = [column for column in LABEL_COLUMNS if column in features]
        classes = [column for column, kind in features.items() if isinstance(kind, ClassLabel)]
        likely = [c for c in named if c in classes] or classes or named
        if not likely or (len(likely) > 1 and likely[0] not in LABEL_COLUMNS):
            found = f"several label columns ({', '.join(likely)})" if likely else "no label column"
            raise UserError(f"{name} has {found}: set label_column to one of {columns}")
        label_column = likely[0]
    return image_column, label_column


def _read_labels(
    published: dict[str, Any], name: str, column: str
) -> tuple[dict[str, npt.NDArray[np.int64]], tuple[str, ...]]:
    """Return labels of each split that has any, and the names of the classes."""
    from datasets import ClassLabel

    feature = next(iter(published.values())).features[column]
    raw = {split: np.array(rows[column][:]) for split, rows in published.items()}
    for split, values in raw.items():
        if values.dtype == object and any(value is None for value in values):
            missing = sum(value is None for value in values)
            if missing < len(values):
                raise UserError(f"{name}, {split}: {missing} rows have no {column!r}")
            raw[split] = np.full(len(values), -1)
    class_names: tuple[str, ...] | None = None
    kinds = {values.dtype.kind for values in raw.values() if len(values)}
    if kinds == {"U"}:
        class_names = tuple(sorted({str(value) for values in raw.values() for value in values}))
        raw = {split: np.searchsorted(class_names, values) for split, values in raw.items()}
    elif not kinds <= {"i", "u"}:
        raise UserError(f"{name}: column {column!r} holds {feature}, not class labels")

    # ImageNet's public test split: images whose labels are all -1.
    labels = {s: v.astype(np.int64) for s, v in raw.items() if len(v) and v.max() >= 0}
    if not labels:
        raise UserError(f"{name}: column {column!r} holds no labels")
    if isinstance(feature, ClassLabel):
        class_names = tuple(feature.names)
    elif class_names is None:
        counted = labels.get("train", np.concatenate(list(labels.values())))
        class_names = tuple(str(label) for label in range(int(counted.max()) + 1))
    for split, values in labels.items():
        wrong = values[(values < 0) | (values >= len(class_names))]
        if len(wrong):
            raise UserError(
                f"{name}, {split}: {column!r} holds {wrong[0]}, and labels go from 0 to "
                f"{len(class_names) - 1}"
            )
    return labels, class_names


class _EncodedImages:
    """Chosen rows of an image column of a datasets.Dataset, still encoded."""

    def __init__(self, rows: Any, column: str, indices: npt.NDArray[np.int64], where: str) -> None:
        from datasets import Image

        self.rows = rows.select_columns([column]).cast_column(column, Image(decode=False))
        self.column = column
        self.where = where
        self.indices = indices

    def _field(self, field: str) -> Any:
        """One field of the storage {bytes, path} of all rows, as an Arrow array."""
        storage = self.rows.data.column(self.column)
        return storage.flatten()[[f.name for f in storage.type].index(field)]

    def _encoded(self, positions: Sequence[int]) -> list[tuple[bytes | str, str]]:
        """Return (bytes or path, how to name the image in a message) of each position."""
        rows = self.indices[np.asarray(positions, np.int64)].tolist()
        pairs: list[tuple[bytes | str, str]] = []
        for row, cell in zip(rows, self.rows[rows][self.column], strict=True):
            cell = cell or {"bytes": None, "path": None}
            label = f" ({cell['path']})" if cell["path"] else ""
            if cell["bytes"] is not None:
                pairs.append((cell["bytes"], f"row {row}{label} of {self.where}"))
            elif cell["path"]:
                pairs.append((cell["path"], cell["path"]))
            else:
                pairs.append((b"", f"row {row} of {self.where}"))
        return pairs

    def read(self, positions: Sequence[int], *, image_size: int, channels: int) -> Tensor:
        """Decode into uint8 [B, C, S, S], over threads, as Pillow frees the lock while at work."""
        pixels = np.empty((len(positions), channels, image_size, image_size), np.uint8)

        def decode_part(start: int) -> None:
            part = self._encoded(positions[start : start + step])
            for place, (encoded, where) in enumerate(part, start):
                pixels[place] = decode(encoded, image_size, channels, where)

        threads = min(8, os.cpu_count() or 1)
        step = max(1, min(_CHUNK, -(-len(positions) // threads)))
        if len(positions) <= step:
            decode_part(0)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(decode_part, range(0, len(positions), step)))
        return torch.from_numpy(pixels)

    def hash_content(self, update: Callable[[bytes], None]) -> None:
        """Feed sizes and file names of all images, and the bytes of all or of an even sample."""
        import pyarrow.compute as pc  # type: ignore[import-untyped]

        paths = self._field("path").to_pylist()
        sizes = pc.binary_length(self._field("bytes")).to_pylist()
        total = 0
        for row in self.indices.tolist():
            path, size = paths[row] or "", sizes[row]
            if size is None:
                size = os.path.getsize(path) if path else 0
            total += size
            update(f"{os.path.basename(path)}:{size}\n".encode())
        count = len(self.indices)
        hashed = count if total <= HASH_WHOLE_BYTES else min(count, _HASHED_SAMPLE)
        places = [place * count // hashed for place in range(hashed)]
        for start in range(0, hashed, _CHUNK):
            for encoded, _ in self._encoded(places[start : start + _CHUNK]):
                update(Path(encoded).read_bytes() if isinstance(encoded, str) else encoded)
