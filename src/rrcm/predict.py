"""Names the class of image files, with the radius inside which no attack changes it."""

from collections.abc import Iterator
from pathlib import Path

import torch

from rrcm import data
from rrcm.encoder import Classifier
from rrcm.pretrained import load_pretrained
from rrcm.smoothing import ABSTAIN, SmoothedClassifier, format_radius


def predict_files(
    model: str, paths: list[Path], n0: int, n: int, alpha: float, seed: int, device: torch.device
) -> Iterator[str]:
    """One line an image: its file, the class, and the certified L2 radius, or that it abstains.

    Args:
        model: a saved Classifier's folder or hub name.
        paths: image files; each must have the model's size.
        n0: samples that pick the class.
        n: further samples that bound its probability.
        alpha: probability that a radius is wrong.
        seed: seed of the noise.
        device: where to run.

    Raises:
        UserError: no such model or image, or an image of another size; nothing is printed then.
    """
    classifier = load_pretrained(Classifier, model)
    size, channels = classifier.encoder.image_size, classifier.encoder.in_channels
    images = [data.read_image(path, image_size=size, channels=channels) for path in paths]
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
