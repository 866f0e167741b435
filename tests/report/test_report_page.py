"""The HTML report is self-contained, complete and deterministic."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from dist_tl.report.gallery import MAX_TILES, Gallery, pseudo_tiles, top_classes
from dist_tl.report.page import build_page, busy_seconds, byte_text
from dist_tl.report.results import StageRecord
from dist_tl.report.summary import table_rows, verdict


class Page(HTMLParser):
    """Parsed HTML: tags with attributes, and the text outside style sheets."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], "", ""
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data):
        if self._open != "style":
            self.text += " " + data

    def values(self, name, tag=None):
        return [a[name] for t, a in self.tags if name in a and tag in (None, t)]


@pytest.fixture
def full(make_results, metrics, gallery):
    return build_page(make_results(), metrics=metrics, gallery=gallery)


def test_the_report_loads_no_external_resources(full):
    page = Page(full)
    links = [value for name in ("src", "href", "xlink:href", "data") for value in page.values(name)]
    assert links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    assert "@import" not in full
    assert set(re.findall(r"url\((.)", full)) <= {"#"}
    assert not re.search(r"https?://", full)


def test_the_content_security_policy_forbids_loading(full):
    assert "default-src 'none'" in Page(full).values("content", "meta")[-2]


def test_sections_are_in_the_documented_order(full):
    headings = [
        "Results",
        "Findings",
        "Accuracy per arm",
        "Loss",
        "Samples",
        "Timeline",
        "Generator quality",
        "Shards and store",
        "Run",
    ]
    assert re.findall(r"<h2[^>]*>([^<]*)</h2>", full) == headings


def test_the_report_shows_verdict_table_and_findings(full, make_results):
    results, text = make_results(), Page(full).text
    assert " ".join(verdict(results).split()) in text
    for row in table_rows(results):
        assert " ".join(row) in text.replace("\u00a0", " ")
    assert results.findings[0] in text
    assert results.fingerprint in text
    assert "torch 2.13.0" in text


def test_references_have_a_section_of_their_own_below_the_arms(full):
    heading = full.index("References: they use data")
    assert full.index(">distillation</th>") < heading < full.index(">finetune (reference)</th>")


def test_shard_figures_are_summed_over_generating_stages(full):
    text = Page(full).text
    assert "Shards 100" in text
    assert "Stored 75.0 MiB" in text
    assert "Pseudo-samples 51,200" in text
    assert "Samples per second 100.4" in text  # 51,200 in 510 s from first start to last end
    assert "Starved 12.5 s" in text
    assert "Overlap 42.5 s" in text


def test_ids_are_unique_and_references_resolve(full):
    page = Page(full)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    named = set(page.values("aria-labelledby")) | set(re.findall(r"url\(#([^)]+)\)", full))
    named |= {link.removeprefix("#") for link in page.values("href")}
    assert named <= set(ids)


def test_images_and_plots_have_alternative_texts(full):
    page = Page(full)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert images[0]["alt"] == "pseudo sample for zero 70 %, one 30 %"
    assert all(attributes.get("alt") for attributes in images)
    assert all(a.get("aria-label") for tag, a in page.tags if tag == "svg")
    assert all(a.get("scope") for tag, a in page.tags if tag == "th")


def test_every_stage_has_a_bar_with_its_name_in_both_widths(make_results, metrics):
    results = make_results({f"arm{i}": 0.8 for i in range(7)} | {"scratch": 0.8})
    page = build_page(results, metrics=metrics, gallery=None)
    assert len(results.stages) == 80
    for stage in results.stages:
        assert len(re.findall(rf"<title>\d+\. {stage.name}: ", page)) == 2


def test_the_output_is_deterministic(full, make_results, metrics, gallery):
    assert build_page(make_results(), metrics=metrics, gallery=gallery) == full


def test_names_are_escaped(make_results, gallery):
    odd = "<img src=x onerror=alert(1)> & $a_b$"
    results = make_results(
        {"scratch": 0.8, odd: 0.9},
        findings=(odd,),
        versions={odd: odd},
        run=odd,
        stages=(StageRecord(name=odd, kind=odd, started=0, ended=9),),
    )
    classes = (odd, "one", "two")
    gallery = Gallery(**{**vars(gallery), "source_classes": classes, "captions": (odd,) * 6})
    page = build_page(results, metrics={odd: [{"step": 1, "loss": 1.0}]}, gallery=gallery)
    assert "<img src=x" not in page
    assert "onerror" not in {name for _, attributes in Page(page).tags for name in attributes}
    assert Page(page).text.count(odd) > 10


def test_one_seed_shows_no_interval(make_results):
    page = build_page(make_results(seeds=1), metrics={}, gallery=None)
    assert "±" not in page
    assert "One seed, no intervals" in page
    assert "One seed cannot show that an arm beats" in page


def test_empty_sections_are_omitted(make_results):
    bare = make_results(
        scores=(), summaries=(), stages=(), quality=None, overlap={}, findings=(), versions={}
    )
    page = build_page(bare, metrics={}, gallery=None)
    assert re.findall(r"<h2[^>]*>([^<]*)</h2>", page) == ["Findings", "Run"]
    assert "No findings." in page


def test_one_stage_and_one_row_of_metrics_are_enough(make_results):
    stage = StageRecord(name="only", kind="train", started=5.0, ended=5.0)
    results = make_results({"scratch": 1.0}, seeds=1, stages=(stage,))
    page = build_page(results, metrics={"only": [{"step": 1, "loss": 0.0}]}, gallery=None)
    assert "All stages as a list (1)" in page
    assert "1. only: 0.0 s to 0.0 s (0.0 s)" in page


def test_the_report_does_not_import_pyplot():
    code = "import sys, dist_tl.report.page; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_busy_seconds_count_overlapping_spans_once():
    assert busy_seconds([(0, 10), (2, 3), (5, 12), (20, 21)]) == 13
    assert busy_seconds([]) == 0


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1,023 bytes"), (1536, "1.5 KiB"), (1 << 30, "1.0 GiB")],
)
def test_byte_text_uses_powers_of_1024(size, text):
    assert byte_text(size) == text


def test_top_classes_always_include_the_first():
    flat = np.full(1000, 0.001, np.float32)
    names = [f"class {k}" for k in range(1000)]
    assert [share.name for share in top_classes(flat, names)] == ["class 0"]
    shares = top_classes(np.float32([0.1, 0.6, 0.004, 0.296]), names)
    assert [share.name for share in shares] == ["class 1", "class 3", "class 0"]


def test_a_large_gallery_shows_only_the_first_images(gallery):
    many = Gallery(
        **{
            **vars(gallery),
            "pseudo_images": np.zeros((100, 2, 2, 1), np.uint8),
            "conditions": np.tile(gallery.conditions[:1], (100, 1)),
            "captions": (),
        }
    )
    assert len(pseudo_tiles(many)) == MAX_TILES


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pseudo_images", np.zeros((6, 8, 8, 1), np.float32), "uint8"),
        ("target_images", np.zeros((4, 12, 12, 4), np.uint8), "1 or 3"),
        ("conditions", np.zeros((6, 2), np.float32), r"\(6, 3\)"),
        ("target_labels", np.array([0, 1]), r"\(4,\)"),
        ("target_labels", np.array([0, 1, 2, 0]), r"0\.\.1"),
        ("captions", ("one",), r"\(6,\)"),
    ],
)
def test_an_inconsistent_gallery_is_rejected(gallery, field, value, message):
    with pytest.raises(ValueError, match=f"{field}.*{message}"):
        Gallery(**{**vars(gallery), field: value})
