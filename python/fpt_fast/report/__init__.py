"""What a run leaves behind for people: tables as files, and one self-contained page."""

from fpt_fast.report.card import model_card
from fpt_fast.report.card_facts import CardFacts
from fpt_fast.report.files import read_predictions, write_predictions, write_run_files
from fpt_fast.report.page import REPORT_FILE, write_report
from fpt_fast.report.predictions_table import worst_first

__all__ = [
    "REPORT_FILE",
    "CardFacts",
    "model_card",
    "read_predictions",
    "worst_first",
    "write_predictions",
    "write_report",
    "write_run_files",
]
