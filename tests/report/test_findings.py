import json

import pytest

from tests.report.example import example_report
from weightsmith.errors import ReportError
from weightsmith.report.findings import Report


@pytest.mark.parametrize("kind", ["models", "recipe", "merged"])
def test_json_round_trip_is_lossless(kind):
    report = example_report(layers=2, kind=kind)
    text = json.dumps(report.to_json(), allow_nan=False)
    assert Report.from_json(json.loads(text)) == report


def test_json_of_another_format_is_refused():
    content = example_report(1, 1).to_json()
    with pytest.raises(ReportError, match="format 99"):
        Report.from_json({**content, "format": 99})


def test_json_that_is_no_report_names_the_place():
    content = example_report(1, 2).to_json()
    content["changes"]["total"][0]["entries"] = "many"
    with pytest.raises(ReportError, match=r"changes\.total\.0\.entries"):
        Report.from_json(content)
