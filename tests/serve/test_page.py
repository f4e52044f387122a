"""The page of `virst serve` in a real browser, with the small model of the package and its sample clip.

One test, since it takes its time to compile: a person's afternoon from upload to download, with mistakes.
"""

import base64
import json
import re
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from helpers.browser import browser, chromium, wait_until
from helpers.network import CFG, params
from helpers.segmenting import small_model
from helpers.serve_command import virst_serve
from helpers.serving import animation, listening, pixels
from virst_jax.api import Model
from virst_jax.io.masks import encode_mask, read_runs
from virst_jax.io.small_model import CLIP
from virst_jax.serve.results import FORMATS
from virst_jax.tracking import TrackerModel

TIMEOUT = 180_000  # milliseconds for what is compiled
ORANGE = np.array([230, 159, 0])  # of the first object

pytestmark = pytest.mark.heavy


class Page:
    """What a person sees and does.

    Attributes:
      faults: what the browser's console complains about, but for answers of 4xx.
      hosts: from which something was loaded.
    """

    def __init__(self, running: Any, address: str, **settings: Any):
        self.page = running.new_page(viewport={"width": 1280, "height": 900}, **settings)
        self.page.set_default_timeout(TIMEOUT)
        self.address, self.faults, self.hosts = address, list[str](), set[str]()
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", self._complaint)
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        self.page.goto(address)
        self.page.wait_for_selector("body[data-ready]")

    def _complaint(self, message: Any) -> None:
        if message.type == "error" and "status of 4" not in message.text:
            self.faults.append(message.text)

    def settle(self) -> None:
        """Waits until nothing is at work, and the frame is drawn with what is known of it."""
        self.until("document.getElementById('page').ariaBusy === 'false'")
        self.until("document.getElementById('work').hidden")
        self.until("document.getElementById('canvas').dataset.frame === document.getElementById('scrub').value")
        self.page.wait_for_load_state("networkidle")
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def until(self, true: str) -> None:
        """Waits for an expression of JavaScript."""
        wait_until(self.page, true)

    def tells(self, place: str, text: str) -> None:
        """Waits until an element holds a text."""
        self.until(f"document.getElementById({json.dumps(place)}).innerText.includes({json.dumps(text)})")

    def act(self, do: Any) -> None:
        """Does something that asks the server, and waits for its end."""
        do()
        self.settle()

    def pixels(self) -> np.ndarray:
        """What the canvas shows, uint8[H, W, 4]."""
        script = """() => {
          const canvas = document.getElementById("canvas");
          const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          let text = "";
          for (let i = 0; i < data.length; i += 8192) text += String.fromCharCode(...data.subarray(i, i + 8192));
          return [canvas.width, canvas.height, btoa(text)];
        }"""
        width, height, content = self.page.evaluate(script)
        return np.frombuffer(base64.b64decode(content), np.uint8).reshape(height, width, 4)

    def colored(self) -> float:
        """The share of the canvas in the colour of the first object."""
        return float((np.abs(self.pixels()[..., :3].astype(int) - ORANGE).max(-1) <= 2).mean())

    def masks(self, frame: int) -> dict[str, str]:
        """Codes of a frame's masks, as the server tells them."""
        session = urlsplit(self.page.url).fragment
        with urllib.request.urlopen(f"{self.address}/sessions/{session}/masks?first={frame}&count=1") as answer:
            found: dict[str, str] = json.load(answer)["frames"].get(str(frame), {})
        return found

    def to_frame(self, frame: int) -> None:
        self.page.evaluate("document.activeElement.blur()")
        self.page.keyboard.press("Home")
        for _ in range(frame):
            self.page.keyboard.press("ArrowRight")
        self.settle()
        assert self.page.input_value("#scrub") == str(frame)

    def click(self, x: float, y: float, button: str = "left") -> None:
        """On the canvas, at shares of its sides."""
        box = self.page.locator("#canvas").bounding_box()
        self.page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"], button=button)

    def drag(self, begin: tuple[float, float], end: tuple[float, float]) -> None:
        box = self.page.locator("#canvas").bounding_box()
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (begin, end)]
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        self.page.mouse.move(*places[1], steps=3)
        self.page.mouse.up()

    def alert(self) -> str:
        self.page.wait_for_selector("#alerts .message p")
        return str(self.page.locator("#alerts .message p").last.inner_text())

    def opacity(self, percent: int) -> None:
        self.page.evaluate(
            "(value) => { const bar = document.getElementById('opacity'); bar.value = value;"
            " bar.dispatchEvent(new Event('input')); }",
            percent,
        )
        self.settle()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    path = chromium()
    with virst_serve(tmp_path_factory.mktemp("serve")) as (_, address), browser(path) as running:
        yield running, address


@pytest.fixture(scope="module")
def person(running: tuple[Any, str]) -> Page:
    """Somebody who has uploaded the clip and asked for one object."""
    person = Page(*running)
    person.page.set_input_files("#file", {"name": "shapes.mp4", "mimeType": "video/mp4", "buffer": CLIP.read_bytes()})
    person.page.wait_for_selector("#viewer:not([hidden])")
    person.settle()
    assert person.colored() == 0
    person.page.fill("#sentences", "the cyan cross")
    person.act(lambda: person.page.click("#run"))
    assert person.page.locator("#objects .name").all_inner_texts() == ["the cyan cross"]
    assert person.page.input_value("#sentences") == ""
    return person


def area(code: str) -> int:
    return int(np.sum(read_runs(code)[1::2]))


def test_masks_appear_where_they_are(person: Page) -> None:
    """In the object's colour, as many pixels as the mask has, on every frame that is looked at."""
    person.opacity(100)
    shares = []
    for frame in (0, 9, 20):
        person.to_frame(frame)
        share = area(person.masks(frame)["1"]) / 256**2
        assert share > 0.01
        # scaled up, the edge of the mask is blended with the video: up to a pixel of the mask along it
        assert abs(person.colored() - share) < 0.1 * share
        shares.append(person.pixels())
    assert (shares[0] != shares[1]).any()
    person.page.click("#objects button:text-is('Hide')")
    person.settle()
    assert person.colored() == 0
    person.page.click("#objects button:text-is('Show')")
    person.opacity(50)


def test_a_click_undo_and_a_second_object(person: Page) -> None:
    person.to_frame(4)
    page, before, shown = person.page, person.masks(4), person.pixels()
    page.click("#objects .name")
    person.act(lambda: person.click(0.55, 0.75, "right"))
    person.act(lambda: person.click(0.2, 0.2))
    assert person.masks(4) != before
    assert (person.pixels() != shown).any()
    for _ in range(2):
        person.act(lambda: page.click("#undo"))
    assert person.masks(4) == before
    assert (person.pixels() == shown).all()
    page.click("#new-object")
    page.click("[data-tool=box]")
    person.act(lambda: person.drag((0.55, 0.1), (0.75, 0.3)))
    assert page.locator("#objects li").count() == 2
    assert page.locator("#objects li.chosen .name").inner_text() == "object 2"
    # two clicks at once belong to the same object
    page.click("[data-tool=add]")
    with page.expect_response(re.compile("/points")):
        person.click(0.6, 0.2)
        person.click(0.7, 0.25)
    person.settle()
    assert page.locator("#objects li").count() == 2
    assert set(person.masks(4)) == {"1", "2"}
    assert "2" not in person.masks(20)
    person.act(lambda: page.click("#track"))
    assert "2" in person.masks(20)
    assert re.fullmatch(r"in \d+ of 32 frames", page.locator("#objects .facts").last.inner_text())
    person.act(lambda: page.locator("#objects button:text-is('Remove')").last.click())
    assert page.locator("#objects li").count() == 1


def test_mistakes(person: Page) -> None:
    """Each is one line above the page, and nothing is lost."""
    page = person.page
    before = person.masks(4)
    for text, told in (
        ("3000, 2", "outside of the frame"),
        ("9,9,3,3", "has no area"),
        ("a dog", "no point and no box"),
    ):
        page.fill("#place", text)
        page.click("#numbers button")
        person.tells("alerts", told)
        assert page.input_value("#place") == text
    page.click("#run")
    person.tells("alerts", "Write a sentence first")
    assert page.locator("#objects li").count() == 1
    assert person.masks(4) == before
    other = Page(page.context.browser, person.address)
    other.page.set_input_files("#file", {"name": "notes.mp4", "mimeType": "video/mp4", "buffer": b"no video"})
    assert other.alert().startswith("Notes.mp4: cannot be read as a video")
    assert other.page.is_visible("#sample")  # it can be tried again
    assert other.faults == []
    other.page.close()


def test_two_people(person: Page) -> None:
    """The second waits for the first, sees it, and cancels; a reload brings everything back."""
    second = Page(person.page.context.browser, person.address)
    second.page.click("#sample")
    second.page.wait_for_selector("#viewer:not([hidden])")
    second.page.click("#suggestions button >> nth=1")
    second.page.click("#suggestions button >> nth=2")
    assert second.page.input_value("#sentences") == "the shape that stays still\nthe one that appears last"
    person.page.fill("#sentences", "the cyan star\nthe red triangle\nthe cyan shapes")
    with person.page.expect_response(re.compile("/sentences")):
        person.page.click("#run")
    with second.page.expect_response(re.compile("/sentences")):
        second.page.click("#run")
    second.tells("work-text", "1 before it in the queue")
    second.page.click("#cancel")
    assert second.alert() == "Cancelled before it began"
    assert second.page.input_value("#sentences")  # it can be asked again
    assert second.page.locator("#objects li").count() == 0
    assert second.faults == []
    person.settle()
    assert person.page.locator("#objects li").count() == 4
    before = person.page.locator("#objects").inner_text()
    person.page.reload()
    person.page.wait_for_selector("#viewer:not([hidden])")
    person.settle()
    assert person.page.locator("#objects").inner_text() == before
    person.act(lambda: person.page.click("#undo"))
    assert person.page.locator("#objects li").count() == 1
    second.page.close()


def test_download(person: Page, tmp_path: Path) -> None:
    assert person.page.input_value("#format") == "all"
    with person.page.expect_download() as waiting:
        person.page.click("#download")
    assert waiting.value.suggested_filename == "shapes-all.zip"
    waiting.value.save_as(tmp_path / "all.zip")
    names = zipfile.ZipFile(tmp_path / "all.zip").namelist()
    assert {name.partition("/")[0] for name in names} == set(FORMATS)


def test_keys_and_narrow_windows(person: Page) -> None:
    page = person.page
    person.to_frame(5)
    page.keyboard.press("Shift+ArrowRight")
    assert page.input_value("#scrub") == "15"
    page.keyboard.press("End")
    assert page.input_value("#scrub") == "31"
    page.keyboard.press("ArrowRight")
    assert page.input_value("#scrub") == "31"
    page.keyboard.press("Home")
    page.keyboard.press(" ")
    person.until("Number(document.getElementById('scrub').value) > 2")
    page.keyboard.press(" ")
    assert page.inner_text("#play") == "Play"
    page.keyboard.press("b")
    assert page.get_attribute("[data-tool=box]", "aria-pressed") == "true"
    page.keyboard.press("-")
    page.fill("#sentences", "b - t u 1")  # text is no command
    assert page.get_attribute("[data-tool=sub]", "aria-pressed") == "true"
    page.fill("#sentences", "")
    for width in (320, 600, 900):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # the canvas is drawn anew in its new size, and keeps its shape
        shape = "document.getElementById('canvas').getBoundingClientRect()"
        person.until(f"Math.abs({shape}.width - {shape}.height) <= 1")
        assert page.locator("#canvas").bounding_box()["width"] <= width
    page.set_viewport_size({"width": 1280, "height": 900})
    shown = page.locator("body").aria_snapshot()
    assert re.search(r"- button \"Track\"", shown)
    assert not re.search(r"- (button|textbox|slider|combobox|checkbox|spinbutton|link)(?! \")", shown), shown


def test_light_and_dark(person: Page) -> None:
    page = person.page

    def back() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    page.emulate_media(color_scheme="dark")
    dark = back()
    page.emulate_media(color_scheme="light")
    light = back()
    assert light != dark
    page.click("#theme")
    page.click("#theme")
    assert (page.inner_text("#theme"), back()) == ("Theme: dark", dark)
    page.click("#theme")
    assert back() == light


def test_run_lengths_are_read_as_in_python(person: Page) -> None:
    rng = np.random.default_rng(0)
    masks = [rng.random((7, 9)) < share for share in (0, 0.1, 0.5, 0.9, 1)]
    masks += [np.arange(300 * 400).reshape(300, 400) % 100_003 < 50_000, np.tri(200, 333, dtype=bool)]
    script = """async (cases) => {
      const { decode } = await import("/static/js/masks.js");
      return cases.map(([code, width, height]) => {
        const found = decode(code, width, height);
        return { ...found, pixels: Array.from(found.pixels) };
      });
    }"""
    found = person.page.evaluate(script, [[encode_mask(mask), mask.shape[1], mask.shape[0]] for mask in masks])
    for mask, got in zip(masks, found):
        assert (np.array(got["pixels"], bool).reshape(mask.shape) == mask).all()
        if mask.any():
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), columns.max(), rows.max()]
            assert [got["left"], got["top"], got["right"], got["bottom"]] == box


def test_questions(person: Page, tmp_path: Path) -> None:
    """Of a model that answers; the small one of the package says that it does not."""
    assert person.page.is_disabled("#question")
    assert "does not answer" in person.page.inner_text("#chat-note")
    model = Model(CFG, params(), small_model().tokenizer, answers=True)
    model.chat = lambda video, question, history: f"{question} {len(history)}"  # type: ignore[assignment]
    with listening(tmp_path, model) as address:
        other = Page(person.page.context.browser, address)
        other.page.click("#sample")
        other.page.wait_for_selector("#viewer:not([hidden])")
        for question in ("what?", "<b>why</b>?"):
            other.page.fill("#question", question)
            other.act(lambda: other.page.click("#ask"))
        told = other.page.locator("#talk > *").all_inner_texts()
        assert told == ["what?", "what? 0", "<b>why</b>?", "<b>why</b>? 1"]
        assert other.faults == []
        other.page.close()


def test_a_tracker_alone(person: Page, tmp_path: Path) -> None:
    """It has no field for sentences; clicks do."""
    with listening(tmp_path, TrackerModel(CFG.sam2, params()["sam2"])) as address:
        other = Page(person.page.context.browser, address)
        image = {"name": "a.png", "mimeType": "image/png", "buffer": animation(pixels(1))}
        other.page.set_input_files("#file", image)
        other.page.wait_for_selector("#viewer:not([hidden])")
        assert not other.page.is_visible("#sentences")
        other.act(lambda: other.click(0.5, 0.5))
        assert other.page.locator("#objects .name").all_inner_texts() == ["object 1"]
        assert other.faults == []
        other.page.close()


def test_the_http_interface_is_shown(person: Page) -> None:
    page, faults = person.page.context.browser.new_page(), list[str]()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(f"{person.address}/docs")
    page.wait_for_selector("#JobStatus")
    assert "/segment" in page.inner_text("#content")
    assert faults == []
    page.close()


def test_nothing_was_wrong_or_came_from_elsewhere(person: Page) -> None:
    """To be run last: of all that was done above."""
    assert person.faults == []
    assert person.hosts <= {urlsplit(person.address).netloc, ""}
    person.page.click("#close")
    person.page.wait_for_selector("#welcome:not([hidden])")
    assert urlsplit(person.page.url).fragment == ""
