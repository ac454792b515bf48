"""Names the class of image files, with the radius inside which no attack changes it."""

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from rrcm import data
from rrcm.encoder import Classifier
from rrcm.errors import UserError
from rrcm.pretrained import load_pretrained
from rrcm.smoothing import ABSTAIN, SmoothedClassifier, format_radius


def predict_files(
    model: str,
    paths: list[Path],
    n0: int,
    n: int,
    alpha: float,
    seed: int,
    convert: bool,
    device: torch.device,
) -> Iterator[str]:
    """One line an image: its file, the class, and the certified L2 radius, or that it abstains.

    Args:
        model: a saved Classifier's folder or hub name.
        paths: image files; each must have the model's size.
        n0: samples that pick the class.
        n: further samples that bound its probability.
        alpha: probability that a radius is wrong.
        seed: seed of the noise.
        convert: resize, crop and recolour images that do not fit; the radius is then that of the
            converted image.
        device: where to run.

    Raises:
        UserError: no such model or image, or an image of another size or mode.
    """
    classifier = load_pretrained(Classifier, model)
    size, channels = classifier.encoder.image_size, classifier.encoder.in_channels
    images = [read_image(path, size, channels, convert) for path in paths]
    smoothed = SmoothedClassifier(
        classifier, classifier.sigma, classifier.num_classes, device=device
    )
    for index, (path, image) in enumerate(zip(paths, images, strict=True)):
        certificate = smoothed.certify(data.to_unit(image), n0, n, alpha, seed=seed, index=index)
        if certificate.prediction == ABSTAIN:
            yield f"{path}: abstains (too close to call at sigma {classifier.sigma:g})"
        else:
            names = classifier.class_names
            label = names[certificate.prediction] if names else str(certificate.prediction)
            yield f"{path}: {label}, certified within L2 radius {format_radius(certificate.radius)}"


def read_image(path: Path, image_size: int, channels: int, convert: bool) -> Tensor:
    """An image file as uint8 [channels, image_size, image_size].

    Args:
        path: the file.
        image_size: wanted height and width, in pixels.
        channels: 1 (grey) or 3 (RGB).
        convert: bring another size or mode to the wanted one; otherwise it is refused.

    Raises:
        UserError: not an image, or one of another size or mode.
    """
    if not convert:
        try:
            with Image.open(path) as image:
                found = f"{image.width}x{image.height} {image.mode}"
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or 'is not an image file'}") from None
        except Image.DecompressionBombError as error:
            raise UserError(f"{path}: {error}") from None
        wanted = f"{image_size}x{image_size} {'L' if channels == 1 else 'RGB'}"
        if found != wanted:
            raise UserError(
                f"{path} is {found}, the classifier takes {wanted}; --convert resizes, crops and "
                "recolours it"
            )
    return torch.from_numpy(data.decode(str(path), image_size, channels, str(path)))
