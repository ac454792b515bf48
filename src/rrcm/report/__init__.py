"""Tables and figures from certification results: our journals and Cohen-format .tsv logs."""

from rrcm.report.figures import accuracy_radius_figure, noise_row_figure
from rrcm.report.results import (
    ABSTAIN,
    Results,
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
from rrcm.report.summary import Report, write_report
from rrcm.report.table import (
    certified_accuracy_csv,
    certified_accuracy_markdown,
    certified_accuracy_table,
)

__all__ = [
    "ABSTAIN",
    "Report",
    "Results",
    "abstention_rate",
    "accuracy_interval",
    "accuracy_radius_figure",
    "average_certified_radius",
    "best_sigma_envelope",
    "certified_accuracy",
    "certified_accuracy_csv",
    "certified_accuracy_markdown",
    "certified_accuracy_table",
    "clean_accuracy",
    "default_radii",
    "high_probability_accuracy",
    "noise_row_figure",
    "read_results",
    "write_report",
]
