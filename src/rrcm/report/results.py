"""Results of certification: reading them, and the numbers the field reports.

Shapes: N images of one log, R radii. Radii are L2, on the [0, 1] pixel scale.
"""

import math
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rrcm.errors import UserError

ABSTAIN = -1
"""The prediction of a smoothed classifier that declines to name a class."""

JOURNAL = "journal.jsonl"
"""Name of the journal in the folder of a certification run."""

MAX_COLUMNS = 8
"""Most radii of the default grid, so that the table fits a terminal."""

_LOG_SUFFIXES = {".tsv", ".txt", ".log", ".jsonl"}


@dataclass(frozen=True, eq=False)
class Results:
    """What one certification run, at one sigma, found out about N images."""

    name: str
    """What was certified; runs of one model at several sigmas share it."""
    sigma: float | None
    """Standard deviation of the noise, on the [0, 1] pixel scale; None: the log does not say."""
    index: NDArray[np.int64]
    """[N] numbers of the images in their data set, ascending."""
    label: NDArray[np.int64]
    """[N] true classes, from 0."""
    prediction: NDArray[np.int64]
    """[N] classes of the smoothed classifier; -1 = it abstained."""
    radius: NDArray[np.float64]
    """[N] certified L2 radii; 0 if abstaining."""
    clean_prediction: NDArray[np.int64] | None
    """[N] classes of the base classifier without noise; None: the log does not say."""
    seconds: NDArray[np.float64]
    """[N] time an image took; NaN: the log does not say."""
    draws: NDArray[np.int64] | None = None
    """[N] estimation draws an image took; None: the log does not say."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The header of a journal (n0, n, alpha, seed, model, ...); empty for a Cohen-format log."""

    def __post_init__(self) -> None:
        columns = [self.index, self.label, self.prediction, self.radius, self.seconds]
        if self.clean_prediction is not None:
            columns.append(self.clean_prediction)
        if self.draws is not None:
            columns.append(self.draws)
        shapes = {column.shape for column in columns}
        if len(shapes) != 1 or len(self.index.shape) != 1 or self.index.size == 0:
            raise UserError(
                f"results of {self.name}: each column must hold one value an image, [N] with N at "
                f"least 1; got the shapes {sorted(shapes)}"
            )

    @property
    def images(self) -> int:
        """Number of images, N."""
        return int(self.index.size)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """[N] whether the smoothed classifier named the true class; abstaining is not correct."""
        right: NDArray[np.bool_] = (self.prediction == self.label) & (self.prediction != ABSTAIN)
        return right

    @property
    def reach(self) -> float | None:
        """Largest radius that n draws can certify: sigma * Phi^-1(alpha ** (1 / n)).

        None if the settings do not give n and alpha, or name a bound other than Clopper-Pearson.
        """
        n, alpha = self.settings.get("n"), self.settings.get("alpha")
        other_bound = self.settings.get("bound", "clopper-pearson") != "clopper-pearson"
        if n is None or alpha is None or self.sigma is None or other_bound:
            return None
        from rrcm.smoothing.bounds import max_radius  # its package imports torch: seconds

        try:
            return max_radius(n, alpha, self.sigma)
        except ValueError as error:
            raise UserError(f"settings of {self.name}: {error}") from error


def certified_accuracy(results: Results, radii: ArrayLike) -> NDArray[np.float64]:
    """Share of images whose prediction is right and certified at least as far as each radius.

    Abstaining counts as wrong. At r = 0 this is the accuracy of the smoothed classifier.

    Args:
        results: N images.
        radii: [R] L2 radii, 0 or more.

    Returns:
        [R] shares in [0, 1].

    Raises:
        UserError: A radius is negative or not finite, or there is none.

    Source: Cohen et al. (2019), section 4, "approximate certified test set accuracy".
    """
    return _certified_counts(results, check_radii(radii)) / results.images


def certified_counts(results: Results, radii: ArrayLike) -> NDArray[np.int64]:
    """Number of images behind `certified_accuracy`, [R]; arguments and errors are the same."""
    return _certified_counts(results, check_radii(radii))


def _certified_counts(results: Results, radii: NDArray[np.float64]) -> NDArray[np.int64]:
    certified = np.sort(results.radius[results.correct])
    # side="left": an image whose radius equals r is certified at r.
    return np.asarray(certified.size - np.searchsorted(certified, radii, side="left"), np.int64)


def average_certified_radius(results: Results) -> float:
    """ACR: mean over the images of the radius where the prediction is right, of 0 elsewhere.

    It depends on which images were certified: compare it on the same images only.

    Returns:
        An L2 radius on the [0, 1] pixel scale.

    Source: Zhai et al., MACER (2020), section 5.
    """
    return math.fsum(results.radius[results.correct]) / results.images


def abstention_rate(results: Results) -> float:
    """Share of images, in [0, 1], on which the smoothed classifier abstained."""
    return float(np.mean(results.prediction == ABSTAIN))


def clean_accuracy(results: Results) -> float | None:
    """Accuracy, in [0, 1], of the base classifier without noise; None: the log does not say."""
    if results.clean_prediction is None:
        return None
    return float(np.mean(results.clean_prediction == results.label))


def accuracy_interval(successes: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Two-sided Clopper-Pearson interval of an accuracy measured on a sample of images.

    It tells how far the share might be from that over all images of the same kind.

    Args:
        successes: Number of images counted, 0 <= successes <= total.
        total: Number of images, at least 1.
        level: Confidence, between 0 and 1, both excluded.

    Returns:
        Low and high end, in [0, 1].

    Raises:
        UserError: An argument is out of its range.

    Source: Clopper and Pearson (1934).
    """
    from rrcm.smoothing.bounds import clopper_pearson_interval  # its package imports torch

    try:
        return clopper_pearson_interval(successes, total, 1.0 - level)
    except ValueError as error:
        raise UserError(
            f"no interval at level {level} for {successes} of {total} images: {error}"
        ) from error


def high_probability_accuracy(
    results: Results, radii: ArrayLike, rho: float = 0.001
) -> NDArray[np.float64]:
    """Lower bound of the certified accuracy that allows for false certificates.

    Each of the N certificates may be wrong with probability alpha. With probability at least
    1 - rho over all draws, the share of these images that is truly robust is not below the result;
    `certified_accuracy` says nothing of the sort.

    Args:
        results: N images; their settings tell alpha.
        radii: [R] L2 radii, 0 or more.
        rho: Probability of error of the statement, between 0 and 1.

    Returns:
        [R] shares in [0, 1]; NaN if alpha is not known.

    Raises:
        UserError: rho or a radius is unusable.

    Source: the bound of Cohen et al. (2019), appendix, with the exact binomial quantile of the
        number of wrong certificates in place of Bernstein's inequality.
    """
    from scipy import stats

    if not 0.0 < rho < 1.0:
        raise UserError(f"rho must lie between 0 and 1, both excluded, got {rho}")
    shares = certified_accuracy(results, radii)
    alpha = results.settings.get("alpha")
    if alpha is None:
        return np.full_like(shares, np.nan)
    wrong = float(stats.binom.ppf(1.0 - rho, results.images, alpha)) / results.images
    bound: NDArray[np.float64] = np.maximum(shares - wrong, 0.0)
    return bound


def same_images(results: Sequence[Results]) -> bool:
    """Whether all results are on the same images: data set, indices and labels are equal."""
    first = results[0]
    data = {r.settings["data"] for r in results if "data" in r.settings}
    return len(data) <= 1 and all(
        np.array_equal(r.index, first.index) and np.array_equal(r.label, first.label)
        for r in results
    )


def best_sigma_envelope(results: Sequence[Results], radii: ArrayLike) -> NDArray[np.float64]:
    """At each radius, the best certified accuracy over the results: the choice of sigma is free.

    The choice is made on the images it is reported on, so the envelope flatters a little.

    Args:
        results: One or more, all on the same images.
        radii: [R] L2 radii, 0 or more.

    Returns:
        [R] shares in [0, 1].

    Raises:
        UserError: There are no results, they are on different images, or a radius is unusable.
    """
    if not results:
        raise UserError("a best-sigma envelope needs at least one set of results; got none")
    if not same_images(results):
        names = ", ".join(f"{r.name} (sigma {sigma_text(r.sigma)})" for r in results)
        raise UserError(
            f"no best-sigma envelope of {names}: they were not certified on the same images; "
            "certify the same indices of the same data at every sigma"
        )
    best = np.zeros_like(check_radii(radii))
    for r in results:
        np.maximum(best, certified_accuracy(r, radii), out=best)
    return best


def default_radii(results: Sequence[Results]) -> NDArray[np.float64]:
    """Multiples of 0.25 from 0 to the largest certified radius, at most `MAX_COLUMNS` of them.

    The step doubles until they fit. Only right predictions count.

    Args:
        results: One or more.

    Returns:
        [R] radii, ascending from 0.
    """
    largest = max((float(r.radius[r.correct].max(initial=0.0)) for r in results), default=0.0)
    step = 0.25
    while math.floor(largest / step) + 1 > MAX_COLUMNS:
        step *= 2.0
    return np.arange(math.floor(largest / step) + 1, dtype=np.float64) * step


def check_radii(radii: ArrayLike) -> NDArray[np.float64]:
    """`radii` as an array [R] of float; UserError unless all are finite and 0 or more."""
    try:
        values = np.atleast_1d(np.asarray(radii, dtype=np.float64))
    except (TypeError, ValueError):
        raise UserError(f"radii are numbers such as 0.25, got {radii!r}") from None
    if values.ndim != 1 or values.size == 0:
        raise UserError(f"radii are a list of at least one number, got the shape {values.shape}")
    bad = values[~(np.isfinite(values) & (values >= 0.0))]
    if bad.size:
        raise UserError(f"a radius is finite and not negative, got {bad[0]}")
    return values


def number_text(value: float) -> str:
    """The shortest decimal that reads back as `value`: "0.25", "1"."""
    return np.format_float_positional(value, trim="-")


def sigma_text(sigma: float | None) -> str:
    """`sigma` as a short decimal; "?" if the log does not say."""
    return "?" if sigma is None else number_text(sigma)


def read_results(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[Results]:
    """Reads journals and Cohen-format logs.

    A folder stands for every `journal.jsonl` in it and below; if it has none, for the .tsv files
    in it. A log is named after its folder (journal) or file (Cohen's format), less the part that
    gives sigma, so that the sigmas of one model share a name. The sigma of a Cohen-format log is
    taken from its file name (`sigma_0.25`, `noise_0.50`), else unknown; its radii are as its
    author rounded them. Whether a prediction is right is always computed from the label; a column
    "correct" that disagrees is told in a `UserWarning`.

    Args:
        paths: Files and folders, one or several; a file found twice is read once.

    Returns:
        One `Results` a log, sorted by sigma (unknown last), then by name.

    Raises:
        UserError: A path does not exist or holds no results; a log is empty, malformed (the
            message names the line) or has an image twice (the message names the image).
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    files = list(
        {file.resolve(): file for path in paths for file in _files_at(Path(path))}.values()
    )
    if not files:
        raise UserError("no results to read: name a folder with a journal.jsonl, or a .tsv log")
    results = [_read_file(file) for file in files]
    return sorted(
        _told_apart(results, files), key=lambda r: (r.sigma is None, r.sigma or 0.0, r.name)
    )


def _files_at(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]  # reading it tells what is wrong with it
    files = sorted(path.rglob(JOURNAL)) or sorted(path.glob("*.tsv"))
    if not files:
        raise UserError(f"{path} holds no results: no {JOURNAL} in it or below, and no .tsv file")
    return files


def _read_file(path: Path) -> Results:
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot read {path}: {reason}; name a folder with a {JOURNAL}, or a .tsv log"
        ) from error
    # By content: Cohen et al.'s own logs have no suffix.
    return _read_journal(path) if start.startswith(b"{") else _read_tsv(path)


def _read_journal(path: Path) -> Results:
    from rrcm.smoothing.journal import read_journal

    try:
        settings, rows = read_journal(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    where, sigma = f"the settings of {path}", settings.get("sigma")
    if sigma is not None:
        sigma = _real(sigma, "sigma", where)
        if sigma == 0.0:
            raise UserError(f"sigma in {where} is 0; it is a positive number")
    for key in ("n0", "n"):
        if key in settings:
            _whole(settings[key], key, where, 1)
    if "alpha" in settings and not 0.0 < _real(settings["alpha"], "alpha", where) < 1.0:
        raise UserError(f"alpha in {where} is {settings['alpha']}; it lies between 0 and 1")
    images = []
    for row in rows:
        where = f"image {row.get('index')} of {path}"
        try:
            clean = row.get("clean_prediction")
            images.append(
                _Image(
                    where=where,
                    index=_whole(row["index"], "index", where, 0),
                    label=_whole(row["label"], "label", where, 0),
                    prediction=_whole(row["prediction"], "prediction", where, ABSTAIN),
                    radius=_real(row["radius"], "radius", where),
                    correct=_optional_whole(row.get("correct"), "correct", where),
                    clean=None if clean is None else _whole(clean, "clean_prediction", where, 0),
                    seconds=_real(row.get("seconds", math.nan), "seconds", where, nan=True),
                    draws=_optional_whole(row.get("n", settings.get("n")), "n", where),
                )
            )
        except KeyError as error:
            raise UserError(f"{where} lacks {error}; a row of a journal has it") from None
    return _results(sigma, images, settings, path)


def _read_tsv(path: Path) -> Results:
    """Cohen et al.'s format: tab-separated columns idx, label, predict, radius, correct, time."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is no text (byte {error.start}); a log is tab-separated UTF-8 text"
        ) from None
    header = lines[0].split("\t") if lines else []
    missing = [name for name in ("idx", "label", "predict", "radius") if name not in header]
    if not any(line.strip() for line in lines):
        raise UserError(f"{path} is empty: a log has a header and a line an image")
    if missing:
        raise UserError(
            f"line 1 of {path} lacks the column {missing[0]}: a log begins with the tab-separated "
            "header idx, label, predict, radius, correct, time"
        )
    images = []
    for number, line in enumerate(lines[1:], start=2):
        where = f"line {number} of {path}"
        values = line.split("\t")
        if len(values) != len(header):
            raise UserError(
                f"{where} has {len(values)} fields, not {len(header)} as the header; "
                "it may be torn: repair or delete it"
            )
        row = dict(zip(header, values, strict=True))
        images.append(
            _Image(
                where=where,
                index=_whole(row["idx"], "idx", where, 0),
                label=_whole(row["label"], "label", where, 0),
                prediction=_whole(row["predict"], "predict", where, ABSTAIN),
                radius=_real(row["radius"], "radius", where),
                correct=_optional_whole(row.get("correct"), "correct", where),
                clean=None,
                seconds=_duration(row["time"], where) if "time" in row else math.nan,
                draws=None,
            )
        )
    stem = path.stem if path.suffix in _LOG_SUFFIXES else path.name
    found = re.search(r"(?:sigma|noise)[_=-]?(\d+(?:\.\d+)?)", stem)
    sigma = (float(found[1]) or None) if found else None
    return _results(sigma, images, {}, path)


@dataclass(frozen=True)
class _Image:
    """One line of a log."""

    where: str
    index: int
    label: int
    prediction: int
    radius: float
    correct: int | None
    clean: int | None
    seconds: float
    draws: int | None


def _results(
    sigma: float | None, images: list[_Image], settings: dict[str, Any], path: Path
) -> Results:
    if not images:
        raise UserError(f"{path} has a header but no images yet: certify at least one")
    seen: dict[int, str] = {}
    for image in images:
        if image.index in seen:
            raise UserError(
                f"image {image.index} is twice in {path}: on {seen[image.index].split(' of ')[0]} "
                f"and {image.where.split(' of ')[0]}; each image counts once, delete one of them"
            )
        seen[image.index] = image.where
    _warn_if_correct_disagrees(images, path)
    images = sorted(images, key=lambda image: image.index)
    clean = [image.clean for image in images if image.clean is not None]
    draws = [image.draws for image in images if image.draws is not None]
    return Results(
        name=_name_parts(path, sigma)[0],
        sigma=sigma,
        index=np.array([image.index for image in images], np.int64),
        label=np.array([image.label for image in images], np.int64),
        prediction=np.array([image.prediction for image in images], np.int64),
        radius=np.array([image.radius for image in images], np.float64),
        clean_prediction=np.array(clean, np.int64) if len(clean) == len(images) else None,
        seconds=np.array([image.seconds for image in images], np.float64),
        draws=np.array(draws, np.int64) if len(draws) == len(images) else None,
        settings=settings,
    )


def _warn_if_correct_disagrees(images: list[_Image], path: Path) -> None:
    given = [image.correct for image in images]
    right = [int(image.prediction == image.label) for image in images]
    wrong = [k for k, value in enumerate(given) if value is not None and value != right[k]]
    if not wrong:
        return
    running = "; it is a running count" if given == list(np.cumsum(right)) else ""
    warnings.warn(
        f'{path}: the column "correct" disagrees with prediction == label on {len(wrong)} of '
        f"{len(images)} images, first on image {images[wrong[0]].index}{running}. It is ignored: "
        "prediction and label decide",
        stacklevel=2,
    )


def _whole(value: Any, what: str, where: str, minimum: int) -> int:
    try:
        if isinstance(value, float):
            raise ValueError
        number = int(value)
    except (TypeError, ValueError):
        number = minimum - 1
    if not minimum <= number < 2**62:
        raise UserError(f"{what} in {where} is {value!r}; it is a whole number from {minimum} on")
    return number


def _optional_whole(value: Any, what: str, where: str) -> int | None:
    return None if value is None else _whole(value, what, where, -1)


def _real(value: Any, what: str, where: str, nan: bool = False) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not (0.0 <= number < math.inf or (nan and math.isnan(number))):
        raise UserError(f"{what} in {where} is {value!r}; it is a finite number, not negative")
    return number


def _duration(text: str, where: str) -> float:
    """Seconds: "15.4", or "0:00:15.4" as Python prints a timedelta."""
    clock = re.fullmatch(r"(?:(\d+) days?, )?(\d+):(\d\d):(\d\d(?:\.\d+)?)", text)
    if clock is None:
        return _real(text, "time", where)
    days, hours, minutes = (int(part or 0) for part in clock.groups()[:3])
    return 86400.0 * days + 3600.0 * hours + 60.0 * minutes + float(clock[4])


def _name_parts(path: Path, sigma: float | None) -> list[str]:
    """What can name a log, from the inside out: its file or folder, the folders above.

    Each less what gives sigma, and left out if nothing else is in it.
    """
    path = Path(os.path.abspath(path))  # not resolve: a link is named as the user named it
    if path.name == JOURNAL:
        path = path.parent
    stem = path.stem if path.suffix in _LOG_SUFFIXES else path.name
    parts = [stem, *(folder.name for folder in path.parents)]
    named = [_without_sigma(part, sigma) for part in parts]
    return [part for part in named if part] or [str(path)]


def _without_sigma(text: str, sigma: float | None) -> str:
    def keep(match: re.Match[str]) -> str:
        return "" if float(match[1]) == sigma else match[0]

    # "cifar_sigma_0.25", "digits-s0.25" and "digits-0.25" alike: a separator, a word, the number.
    pattern = r"(?:^|[_\-])(?:(?:sigma|noise|s)[_=-]?)?(\d+(?:\.\d+)?)(?=$|[_\-])"
    return re.sub(pattern, keep, text).strip("_- ")


def _told_apart(results: Sequence[Results], paths: Sequence[Path]) -> list[Results]:
    """Puts folders before a name that stands for two logs of one sigma."""
    parts = [_name_parts(path, r.sigma) for r, path in zip(results, paths, strict=True)]
    depths = [1] * len(results)
    while True:
        names = ["/".join(reversed(p[:depth])) for p, depth in zip(parts, depths, strict=True)]
        keys = [(name, r.sigma) for name, r in zip(names, results, strict=True)]
        doubles = {name for name, sigma in keys if keys.count((name, sigma)) > 1}
        deeper = [
            depth + (name in doubles and depth < len(p))
            for name, p, depth in zip(names, parts, depths, strict=True)
        ]
        if deeper == depths:
            return [replace(r, name=name) for r, name in zip(results, names, strict=True)]
        depths = deeper
