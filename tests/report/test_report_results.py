"""Reading logs, and the numbers computed from them."""

import re
import warnings
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest

from rrcm.errors import UserError
from rrcm.report import (
    abstention_rate,
    accuracy_interval,
    average_certified_radius,
    best_sigma_envelope,
    certified_accuracy,
    clean_accuracy,
    default_radii,
    high_probability_accuracy,
    read_results,
)

PUBLISHED = {
    # sigma: the table in the README of locuslab/smoothing, from r = 0.25 in steps of 0.25.
    0.25: (0.60, 0.43, 0.27),
    0.50: (0.55, 0.41, 0.32, 0.23, 0.15, 0.09),
    1.00: (0.39, 0.34, 0.28, 0.22, 0.17, 0.14),
}
RECOMPUTED = {
    # sigma: ACR, then per cent from r = 0 in steps of 0.25; computed by others from the same logs.
    0.25: (0.429, 74.8, 60.0, 42.8, 26.6, 0.0),
    0.50: (0.538, 65.2, 54.6, 41.4, 32.0, 23.4, 15.2, 9.4, 5.2, 0.0),
    1.00: (0.542, 47.2, 39.2, 34.0, 27.8, 21.6, 17.4, 14.0, 11.8, 10.0, 7.6),
}


@pytest.fixture
def cohen(shared):
    folder = shared / "golden" / "cohen-certify-logs"
    if not folder.is_dir():
        pytest.skip(f"no published logs at {folder}")
    return read_results(folder)


def test_the_published_table_comes_out_of_the_published_logs(cohen):
    assert [r.sigma for r in cohen] == [0.25, 0.5, 1.0]
    assert {r.name for r in cohen} == {"cifar10_resnet110"}
    for r in cohen:
        assert r.images == 500
        assert r.index.tolist() == list(range(0, 10_000, 20))
        expected = PUBLISHED[r.sigma]
        radii = 0.25 * np.arange(1, 1 + len(expected))
        assert tuple(np.round(certified_accuracy(r, radii), 2)) == expected


def test_the_digits_others_computed_from_the_published_logs(cohen):
    for r in cohen:
        acr, *shares = RECOMPUTED[r.sigma]
        assert round(average_certified_radius(r), 3) == acr
        radii = 0.25 * np.arange(len(shares))
        np.testing.assert_allclose(100 * certified_accuracy(r, radii), shares, rtol=0, atol=1e-9)
    best = [0.60, 0.43, 0.32, 0.23, 0.17, 0.14]  # column-wise best of PUBLISHED
    envelope = best_sigma_envelope(cohen, 0.25 * np.arange(1, 7))
    np.testing.assert_allclose(np.round(envelope, 2), best)
    assert default_radii(cohen).tolist() == [0.5 * k for k in range(8)]
    assert default_radii(cohen[:1]).tolist() == [0.0, 0.25, 0.5, 0.75]


def test_a_journal_worked_out_by_hand(journal):
    (r,) = read_results(journal())
    assert (r.name, r.sigma, r.images, r.settings["n"]) == ("run", 0.25, 5, 1000)
    # A radius equal to r is certified at r; the wrong 0.55 and the abstention never count.
    radii = [0.0, 0.125, 0.125001, 0.25, 0.250001, 0.5, 0.51]
    assert certified_accuracy(r, radii).tolist() == [0.6, 0.6, 0.4, 0.4, 0.2, 0.2, 0.0]
    assert average_certified_radius(r) == pytest.approx(0.175, abs=1e-15)
    assert abstention_rate(r) == 0.2
    assert clean_accuracy(r) == 0.8
    assert r.correct.tolist() == [True, True, False, False, True]
    assert r.seconds.tolist() == [0.5] * 5
    assert r.reach == pytest.approx(0.25 * NormalDist().inv_cdf(0.001**0.001), abs=1e-9)
    assert default_radii([r]).tolist() == [0.0, 0.25, 0.5]


def test_an_abstention_is_not_correct_even_where_the_label_is_minus_one(journal, toy_rows):
    # A label of -1 would match the abstention; it is refused, not counted.
    toy_rows[3]["label"] = -1
    with pytest.raises(UserError, match=r"label in image 60 of .* is -1; .* from 0 on"):
        read_results(journal(rows=toy_rows))

    toy_rows[3]["label"] = 0
    (r,) = read_results(journal(rows=toy_rows))
    unlabelled = replace(r, label=np.where(r.prediction == -1, -1, r.label))
    assert certified_accuracy(unlabelled, [0.0]).tolist() == [0.6]


def test_the_reach_is_unknown_under_another_bound(journal):
    assert read_results(journal(bound="betting"))[0].reach is None
    assert read_results(journal(bound="clopper-pearson"))[0].reach is not None


def test_a_log_is_named_as_the_user_names_it(journal, tmp_path, monkeypatch):
    journal("real")
    (tmp_path / "link").symlink_to("real")
    assert [r.name for r in read_results(tmp_path / "link")] == ["link"]
    monkeypatch.chdir(tmp_path / "real")
    assert [r.name for r in read_results(".")] == ["real"]


def test_a_cohen_log_read_in_full(tsv):
    path = tsv("20 7 -1 0.0 0 15.6", "0 3 3 0.378 1 0:01:15.5", "5 3 4 0.2 0 2:00:00")
    (r,) = read_results(path)
    assert (r.name, r.sigma) == ("toy", 0.25)
    assert r.index.tolist() == [0, 5, 20]
    assert r.prediction.tolist() == [3, 4, -1]
    assert r.seconds.tolist() == [75.5, 7200.0, 15.6]
    assert r.clean_prediction is None
    assert clean_accuracy(r) is None
    assert r.reach is None


@pytest.mark.parametrize(
    ("name", "model", "sigma"),
    [
        ("net_sigma_1.00.tsv", "net", 1.0),
        ("noise_0.50", "folder", 0.5),
        ("sigma_0.25", "folder", 0.25),
        ("net-sigma0.5-n1000.tsv", "net-n1000", 0.5),
        ("resnet110.tsv", "resnet110", None),
    ],
)
def test_name_and_sigma_of_a_cohen_log(tsv, name, model, sigma):
    (r,) = read_results(tsv("0 1 1 0.5 1 1.0", name=f"folder/{name}"))
    assert (r.name, r.sigma) == (model, sigma)


def test_folders_stand_for_the_journals_below_them_once_each(journal, tmp_path):
    for folder, sigma in [("q/b-0.50", 0.5), ("q/b-0.25", 0.25), ("q/sigma_1.00", 1.0)]:
        journal(folder, sigma=sigma)
    found = read_results([tmp_path / "q", tmp_path / "q" / "b-0.50", str(tmp_path)])
    assert [(r.name, r.sigma) for r in found] == [("b", 0.25), ("b", 0.5), ("q", 1.0)]


def test_names_that_clash_get_their_folders(journal, tmp_path):
    journal("one/net/sigma_0.25")
    journal("two/net/sigma_0.25")
    journal("two/other")
    names = sorted(r.name for r in read_results(tmp_path))
    assert names == ["one/net", "other", "two/net"]


def test_a_running_count_in_the_column_correct_is_told_and_ignored(tsv):
    path = tsv("0 3 3 0.3 1 1.0", "20 7 7 0.1 2 1.0", "40 1 2 0.1 2 1.0")
    with pytest.warns(UserWarning, match=r"on 2 of 3 images, first on image 20; .* running count"):
        (r,) = read_results(path)
    assert certified_accuracy(r, [0.0]).tolist() == [pytest.approx(2 / 3)]


def test_no_warning_where_the_column_correct_is_right(tsv, journal):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_results([tsv("0 3 3 0.3 1 1.0", "20 7 -1 0.0 0 1.0"), journal()])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0 3 3 0.3 1 1.0", "20 7 7"], r"line 3 of .*toy_sigma_0.25.tsv has 3 fields, not 6"),
        (["0 3 x 0.3 1 1.0"], r"predict in line 2 of .*\.tsv is 'x'; it is a whole number"),
        (["0 3 -2 0.3 1 1.0"], r"predict in line 2 .* from -1 on"),
        (["0 3 3 nan 1 1.0"], r"radius in line 2 of .* is 'nan'; it is a finite number"),
        (["0 3 3 -0.1 1 1.0"], r"radius in line 2"),
        (["0 3 3 inf 1 1.0"], r"radius in line 2"),
        (["0 3 3 0.3 1 soon"], r"time in line 2"),
        (["99999999999999999999 3 3 0.3 1 1.0"], r"idx in line 2"),
        (["0 3 3 0.3 1 1", "20 7 7 0.1 1 1", "0 3 3 0.3 1 1"],
         r"image 0 is twice in .*\.tsv: on line 2 and line 4"),
        ([], r"toy_sigma_0.25.tsv has a header but no images"),
    ],
)  # fmt: skip
def test_a_malformed_cohen_log_is_refused(tsv, lines, message):
    with pytest.raises(UserError, match=message) as caught:
        read_results(tsv(*lines))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_logs_are_refused(tmp_path, tsv):
    path = tmp_path / "log.tsv"
    for data, message in [
        (b"", r"log.tsv is empty"),
        (b"\n\n", r"log.tsv is empty"),
        (b"\xff\xfe\x00", r"log.tsv is no text"),
        (b"a\tb\n", r"line 1 of .*log.tsv lacks the column idx"),
        (b'{"a": 1}\n', r"log.tsv is not a journal of rrcm"),
    ]:
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            read_results(path)
    with pytest.raises(UserError, match=r"cannot read .*gone"):
        read_results(tmp_path / "gone")
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match=r"void holds no results: no journal.jsonl"):
        read_results(tmp_path / "void")
    with pytest.raises(UserError, match=r"no results to read"):
        read_results([])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("radius", -1.0, r"radius in image 20 of .*journal.jsonl is -1.0"),
        ("prediction", 1.5, r"prediction in image 20 of .* is 1.5"),
        ("label", None, r"label in image 20"),
        ("seconds", "soon", r"seconds in image 20"),
    ],
)
def test_a_malformed_journal_row_is_refused(journal, toy_rows, key, value, message):
    toy_rows[1][key] = value
    with pytest.raises(UserError, match=message):
        read_results(journal(rows=toy_rows))
    del toy_rows[1][key]
    if key != "seconds":
        with pytest.raises(UserError, match=rf"image 20 of .* lacks '{key}'"):
            read_results(journal(rows=toy_rows))


def test_malformed_journals_are_refused(journal, toy_rows):
    for settings, message in [
        ({"sigma": 0}, r"sigma in the settings of .* is 0; it is a positive number"),
        ({"sigma": "big"}, r"sigma in the settings"),
        ({"n": 0}, r"n in the settings"),
        ({"alpha": 1.0}, r"alpha in the settings .* is 1.0; it lies between 0 and 1"),
    ]:
        with pytest.raises(UserError, match=message):
            read_results(journal(**settings))
    with pytest.raises(UserError, match=r"image 0 is in .* twice"):
        read_results(journal(rows=[*toy_rows, toy_rows[0]]))
    with pytest.raises(UserError, match=r"has a header but no images yet"):
        read_results(journal(rows=[]))


def test_a_torn_last_line_of_a_journal_is_dropped_with_a_warning(journal):
    folder = journal()
    path = folder / "journal.jsonl"
    path.write_text(path.read_text()[:-10])
    with pytest.warns(UserWarning, match="torn"):
        (r,) = read_results(folder)
    assert r.index.tolist() == [0, 20, 40, 60]


def test_one_row_without_a_clean_prediction_leaves_clean_accuracy_unknown(journal, toy_rows):
    toy_rows[2]["clean_prediction"] = None
    (r,) = read_results(journal(rows=toy_rows))
    assert clean_accuracy(r) is None


def test_the_envelope_is_the_best_at_each_radius(journal, tmp_path, toy_rows):
    journal("net-0.25")
    for row, radius in zip(toy_rows, [0.9, 0.0, 0.0, 0.0, 0.0], strict=True):
        row.update(
            prediction=row["label"] if radius else -1, radius=radius, correct=int(radius > 0)
        )
    journal("net-0.5", rows=toy_rows, sigma=0.5)
    results = read_results(tmp_path)
    assert best_sigma_envelope(results, [0.0, 0.5, 0.75, 1.0]).tolist() == [0.6, 0.2, 0.2, 0.0]


def test_no_envelope_across_different_images(journal, tmp_path, toy_rows):
    journal("net-0.25")
    journal("net-0.5", rows=toy_rows[:4], sigma=0.5)
    with pytest.raises(UserError, match=re.escape("net (sigma 0.25), net (sigma 0.5): they were")):
        best_sigma_envelope(read_results(tmp_path), [0.0])
    journal("net-0.5", sigma=0.5, data="other")
    with pytest.raises(UserError, match="not certified on the same images"):
        best_sigma_envelope(read_results(tmp_path), [0.0])
    with pytest.raises(UserError, match="at least one"):
        best_sigma_envelope([], [0.0])


def test_the_interval_against_known_values():
    # 0 and n of n have closed forms; 0.1871 and 0.8129 for 5 of 10 are in every table.
    assert accuracy_interval(0, 10) == pytest.approx((0.0, 1 - 0.025 ** (1 / 10)), abs=1e-9)
    assert accuracy_interval(10, 10) == pytest.approx((0.025 ** (1 / 10), 1.0), abs=1e-9)
    assert accuracy_interval(5, 10) == pytest.approx((0.18709, 0.81291), abs=1e-5)
    low, high = accuracy_interval(300, 500, level=0.99)
    assert low < accuracy_interval(300, 500)[0] < 0.6 < accuracy_interval(300, 500)[1] < high
    with pytest.raises(UserError, match="11 of 10 images"):
        accuracy_interval(11, 10)
    with pytest.raises(UserError, match="level 1.5"):
        accuracy_interval(5, 10, level=1.5)


@pytest.mark.parametrize("radii", [[-0.1], [float("nan")], [], ["x"], [[0.1]]])
def test_unusable_radii_are_refused(journal, radii):
    with pytest.raises(UserError, match=r"radi(us|i)"):
        certified_accuracy(read_results(journal())[0], radii)


def test_the_default_grid_has_at_most_eight_columns(journal, toy_rows):
    for largest, columns, last in [
        (0.0, 1, 0.0), (1.75, 8, 1.75), (1.99, 8, 1.75), (2.0, 5, 2.0), (3.99, 8, 3.5),
        (4.0, 5, 4.0),
    ]:  # fmt: skip
        for row in toy_rows:
            row["radius"] = 0.0
        toy_rows[1]["radius"] = largest
        grid = default_radii(read_results(journal(rows=toy_rows)))
        assert (len(grid), grid[0], grid[-1]) == (columns, 0.0, last)


def test_columns_of_different_lengths_are_refused(journal):
    (r,) = read_results(journal())
    with pytest.raises(UserError, match="one value an image"):
        replace(r, radius=r.radius[:1])


def test_high_probability_accuracy_takes_off_the_wrong_certificates(cohen):
    r = replace(cohen[0], settings={"alpha": 0.001})
    # Of 500 certificates, more than 4 are wrong with probability 0.00017, more than 3 with 0.0018.
    wanted = certified_accuracy(r, [0.25, 2.0]) - np.array([4 / 500, 0.0])
    np.testing.assert_allclose(high_probability_accuracy(r, [0.25, 2.0]), wanted)
    assert np.isnan(high_probability_accuracy(cohen[0], [0.25])).all()
    with pytest.raises(UserError, match="rho must lie between 0 and 1"):
        high_probability_accuracy(r, [0.25], rho=0.0)


def test_draws_an_image_come_from_the_rows(journal, toy_rows):
    rows = [row | {"n": 100 * (i + 1)} for i, row in enumerate(toy_rows)]
    (r,) = read_results(journal(rows=rows, stop={"n_max": 1000}))
    assert r.draws.tolist() == [100 * (i + 1) for i in range(len(rows))]
