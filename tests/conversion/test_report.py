"""The page of `virst parity --report`: one file that shows tables, errors and masks."""

import base64
import hashlib
import io
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from conversion import parity, report
from conversion.bisection.walk import Row
from conversion.cases.case import Case, Check, Detail, detail
from helpers.places import PARITY


def images_of(page):
    """The images of a page, decoded."""
    uris = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))).convert("RGB")) for uri in uris]


def outside_links(page):
    return re.findall(r'(?:src|href)="(?!data:)[^"]*"', page)


@pytest.fixture
def case():
    case = Case("e2e_dog", {"expression": "the <dog>", "dtype": "float32", "versions": {"torch": "2.6.0"}}, {})
    theirs = np.random.default_rng(0).normal(size=(5, 8))
    case.details.append(detail("obj_ptr", theirs * (1 + 1e-6), theirs, by_frame=True))
    ours, recorded = np.zeros((2, 20, 30), bool)
    ours[:10], recorded[5:15] = True, True
    case.details.append(Detail("video_mask_bits", masks=((3, ours, recorded),)))
    return case


def test_page_of_a_case(case, tmp_path):
    checks = [Check("obj_ptr", True, 1e-6, 2e-6), Check("prompts", False, note="5 of 6 masks")]
    section = report.case_section(case, checks, 12.3)
    report.write_page(tmp_path / "new" / "a.html", "Parity of cases", [section], "1 cases, 2 outputs, 1 failed")
    page = (tmp_path / "new" / "a.html").read_text()
    assert not outside_links(page)
    assert "the &lt;dog&gt;" in page
    assert "recorded: torch: 2.6.0" in page
    assert page.count('<tr class="wrong">') == 1
    assert '<td class="number">2.0e-06</td>' in page
    assert "<td>5 of 6 masks</td>" in page  # a note that begins with a number
    assert "jaxlib" in page
    histogram, frames, masks = images_of(page)
    assert min(histogram.std(), frames.std()) > 5  # something is drawn
    third = masks.shape[1] // 3
    both, mine, his = (masks[round(masks.shape[0] * row / 20), -third // 2].tolist() for row in (7, 2, 12))
    assert (tuple(both), tuple(mine), tuple(his)) == (report.SAME, report.OURS, report.THEIRS)
    assert "frame 3: ours, recorded, difference (300 pixels)" in page


def test_histogram_and_frames():
    theirs = np.ones((2, 4))
    ours = theirs.copy()
    ours[1] += 1e-3
    told = detail("x", ours, theirs, by_frame=True)
    assert told.histogram is not None
    edges = Detail.edges()
    assert told.histogram[0] == 4  # equal
    (place,) = np.flatnonzero(told.histogram[1:]) + 1
    assert edges[place] <= -3 <= edges[place + 1] + 1e-9
    assert told.frames == pytest.approx((0, 1e-3))
    assert detail("x", ours[:1], theirs, by_frame=True).histogram is None


def test_page_of_a_bisection(case, tmp_path):
    rows = [
        Row("image / pixels", "image.pixels", 0.0, 0.0, 1e-7),
        Row("image / block 0", "image.block0", 1e-2, 1e-2, 1e-6),
    ]
    report.write_page(
        tmp_path / "a.html", "t", [report.bisect_section(case, rows, "")], "first difference: image / block 0"
    )
    page = (tmp_path / "a.html").read_text()
    assert len(images_of(page)) == 1
    assert page.count('<tr class="wrong">') == 1
    assert not outside_links(page)


def test_command_writes_the_page_and_signs_it(tmp_path, capsys):
    for path in PARITY.glob("losses.*"):
        shutil.copy(path, tmp_path)
    page = tmp_path / "a.html"
    assert parity.main([str(tmp_path), "--report", str(page)]) == 0
    text = page.read_text()
    assert "1 cases, 4 outputs, 0 failed" in text
    assert hashlib.sha256((tmp_path / "losses.npz").read_bytes()).hexdigest() in text
