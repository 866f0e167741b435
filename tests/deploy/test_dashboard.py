"""The dashboard shows exactly the metrics that jobs export."""

import json
import re
from pathlib import Path

import dist_tl.cluster.metrics

ROOT = Path(__file__).parents[2]


def test_the_dashboard_shows_every_metric_and_no_other():
    text = (ROOT / "k8s/grafana/dist_tl.json").read_text()
    shown = set(re.findall(r"ray_(dist_tl_\w+)", text))
    exported = set(
        re.findall(r'"(dist_tl_\w+)"', Path(dist_tl.cluster.metrics.__file__).read_text())
    )
    assert shown == exported
    assert json.loads(text)["title"]
