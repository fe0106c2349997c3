"""What a run leaves for people: the log, the HTML report and the model card. No torch and no terminal here.

report_log     RunLog, RunRecord, read_run, layer_grid: runs as data
report_svg     charts and rank maps as text of SVG and HTML
report_html    a RunRecord to a page
report_card    a RunRecord to a model card
"""

from __future__ import annotations

from pathlib import Path

from dynlora_cli.files.whole import write_text
from dynlora_cli.runs.log import read_run
from dynlora_cli.runs.report.card import model_card
from dynlora_cli.runs.report.page import report_page


def write_report(folder: str | Path) -> Path:
    """Writes `report.html` of a run folder: one file, no outside resources, made only from the run's own records.

    Raises:
        UsageError: the folder holds no record of a run.
    """
    path = Path(folder) / "report.html"
    write_text(path, report_page(read_run(folder)))
    return path


def write_card(folder: str | Path) -> Path:
    """Writes the model card `README.md` of a run folder.

    Raises:
        UsageError: the folder holds no record of a run.
    """
    path = Path(folder) / "README.md"
    write_text(path, model_card(read_run(folder)))
    return path
