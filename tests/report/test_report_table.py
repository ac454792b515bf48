"""The table in its three forms."""

import csv
import io

import pytest
from rich.console import Console

from rrcm.errors import UserError
from rrcm.report import (
    certified_accuracy_csv,
    certified_accuracy_markdown,
    certified_accuracy_table,
    read_results,
)


def printed(table, width=100):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    return console.file.getvalue()


def cells(markdown):
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def two(journal, toy_rows, tmp_path):
    """The toy journal at sigma 0.25, and at 0.5 with every radius doubled and 0.999 for one."""
    journal("runs/net-0.25")
    for row in toy_rows:
        row["radius"] *= 2
    toy_rows[1]["radius"] = 0.9999
    journal("runs/net-0.5", rows=toy_rows, sigma=0.5)
    return read_results(tmp_path / "runs")


def test_markdown_of_the_toy_journals(two):
    header, rule, low, high, best = cells(certified_accuracy_markdown(two))
    assert " ".join(header) == "model sigma images n clean ACR abstain r=0 0.25 0.5 0.75"
    assert len(rule) == len(header)
    # 0.75 is beyond 0.615 = 0.25 * 2.463, the most that 1,000 draws can certify: not 0.0.
    assert " ".join(low) == "net 0.25 5 1,000 80.0 0.175 20.0 60.0 40.0 20.0 -"
    # (0.5 + 0.9999 + 0.25) / 5 = 0.34998: rounded down, not to 0.350.
    assert " ".join(high) == "net 0.5 5 1,000 80.0 0.349 20.0 60.0 60.0 40.0 20.0"
    assert best == ["net", "best", "5", "", "", "", "", "60.0", "60.0", "40.0", "20.0"]


def test_the_legend_says_what_the_reader_needs(two):
    text = certified_accuracy_markdown(two)
    assert "can certify: 0.615 at sigma 0.25 and n = 1,000." in text
    assert "wrong with a probability of up to 0.001." in text
    # 3 of 5: Clopper-Pearson 14.66 to 94.73 %, widened to the next tenth.
    assert "14.6 to 94.8 (sigma 0.25, r = 0)" in text
    assert "chosen on these images" in text
    assert "'?':" not in text


def test_terminal_table_tells_shared_values_once_and_fits_80_columns(two):
    text = printed(certified_accuracy_table(two), width=80)
    first, second, _, header, _, low, high, best = map(str.strip, text.splitlines()[:8])
    assert first == "Certified accuracy (%) at L2 radius r"
    assert second == "net, 5 images, n = 1,000"
    assert " ".join(header.split()) == "sigma clean ACR abstain r=0 0.25 0.5 0.75"
    assert " ".join(low.split()) == "0.25 80.0 0.175 20.0 60.0 40.0 20.0 -"
    assert " ".join(high.split()) == "0.5 80.0 0.349 20.0 60.0 60.0 40.0 20.0"
    assert " ".join(best.split()) == "best 60.0 60.0 40.0 20.0"


def test_several_models_fit_80_columns_each_named_once(journal, toy_rows, tmp_path):
    toy_rows[1]["radius"] = 3.6
    for name in ("a-long-name-of-one-network", "other"):
        for sigma in (0.5, 1.0):
            journal(f"runs/{name}-{sigma}", rows=toy_rows, sigma=sigma, n=100_000)
    lines = printed(certified_accuracy_table(read_results(tmp_path / "runs")), 80).splitlines()
    rows = [line.split() for line in lines[4:] if "60.0" in line]
    # Five cells and eight radii: none is folded but the long name.
    assert [len(row) for row in rows] == [13, 12, 9, 13, 12, 9]
    assert [row[0] for row in rows[3:]] == ["other", "1", "best"]
    legend = " ".join(" ".join(lines).split())
    assert "a-long-name-of-one-network, 5 images, n = 100,000; other, 5 images" in legend


def test_no_digit_vanishes_in_a_narrow_terminal(two):
    text = printed(certified_accuracy_table(two, [0.25 * k for k in range(12)]), width=50)
    assert "…" not in text
    assert text.replace("\n", " ").split().count("-") >= 8 + 7  # beyond reach: r > 0.615 and 1.23


def test_a_log_that_says_little(tsv):
    results = read_results(tsv("0 3 3 0.378 1 15.4", "20 7 -1 0.0 0 15.6", name="net.tsv"))
    header, _, row = cells(certified_accuracy_markdown(results, [0, 0.25, 9.5]))
    assert " ".join(header) == "model sigma images ACR abstain r=0 0.25 9.5"
    # Without n and alpha nobody knows the reach: 0.0, not "-".
    assert " ".join(row) == "net ? 2 0.189 50.0 50.0 50.0 0.0"
    assert "'?': the log does not say" in certified_accuracy_markdown(results)


def test_a_zero_within_reach_is_a_zero(journal):
    results = read_results(journal())
    assert cells(certified_accuracy_markdown(results, [0.61, 0.62]))[2][-2:] == ["0.0", "-"]
    (row,) = csv.DictReader(io.StringIO(certified_accuracy_csv(results, [0.61, 0.62])))
    assert (row["certified_0.61"], row["certified_0.62"], row["certified_0.62_low"]) == (
        "0.0",
        "",
        "",
    )


def test_what_is_certified_is_shown_even_beyond_the_reach_that_the_header_claims(journal):
    results = read_results(journal(n=100))  # reach 0.375, but one image has 0.5
    assert cells(certified_accuracy_markdown(results, [0.5, 0.6]))[2][-2:] == ["20.0", "-"]


def test_csv_holds_all_digits_and_every_interval(two):
    rows = list(csv.DictReader(io.StringIO(certified_accuracy_csv(two))))
    assert [(row["name"], row["kind"], row["sigma"]) for row in rows] == [
        ("net", "model", "0.25"), ("net", "model", "0.5"), ("net", "envelope", ""),
    ]  # fmt: skip
    low, high, best = rows
    assert (low["images"], low["n0"], low["n"], low["alpha"]) == ("5", "100", "1000", "0.001")
    assert float(high["acr"]) == pytest.approx((0.5 + 0.9999 + 0.25) / 5, abs=1e-15)
    assert float(low["max_radius"]) == pytest.approx(0.6158, abs=1e-4)
    assert (low["clean_accuracy"], low["abstention_rate"]) == ("0.8", "0.2")
    assert low["certified_0.25"] == "0.4"
    assert float(low["certified_0.25_low"]) == pytest.approx(0.05274, abs=1e-5)
    assert float(low["certified_0.25_high"]) == pytest.approx(0.85337, abs=1e-5)
    assert (best["certified_0.5"], best["certified_0.5_low"], best["acr"]) == ("0.4", "", "")


def test_no_best_row_across_different_images_and_the_legend_says_why(journal, toy_rows, tmp_path):
    journal("runs/net-0.25")
    journal("runs/net-0.5", rows=toy_rows[:3], sigma=0.5)
    text = certified_accuracy_markdown(read_results(tmp_path / "runs"))
    assert [row[1] for row in cells(text)[2:]] == ["0.25", "0.5"]
    assert "Not all rows rest on the same images" in text


def test_models_are_not_mixed_in_a_best_row(journal, tmp_path):
    for folder, sigma in [("a-0.25", 0.25), ("b-0.25", 0.25), ("b-0.5", 0.5)]:
        journal(f"runs/{folder}", sigma=sigma)
    rows = cells(certified_accuracy_markdown(read_results(tmp_path / "runs")))[2:]
    assert [row[:2] for row in rows] == [["a", "0.25"], ["b", "0.25"], ["b", "0.5"], ["b", "best"]]


def test_names_cannot_break_the_table(journal):
    results = read_results([journal("x|y<b>"), journal("[red]z")])
    assert "x\\|y&lt;b>" in certified_accuracy_markdown(results)
    assert "[red]z" in printed(certified_accuracy_table(results))


def test_no_results_and_bad_radii_are_refused(journal):
    for form in (certified_accuracy_table, certified_accuracy_markdown, certified_accuracy_csv):
        with pytest.raises(UserError, match="at least one"):
            form([])
        with pytest.raises(UserError, match="not negative, got -1"):
            form(read_results(journal()), [-1])
