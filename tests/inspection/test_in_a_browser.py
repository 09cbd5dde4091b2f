"""The page in a real browser: Chromium, without a window, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_page import SPECTRA, written_lora

from rankwise.inspection.answer import QUESTIONS
from rankwise.inspection.found import read_adapter
from rankwise.inspection.page import write_inspection

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("Chromium is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("browser")
    adapter, other = written_lora(place / "mine", SPECTRA), written_lora(place / "other", SPECTRA, seed=1)
    return write_inspection([read_adapter(adapter)], place / "page", against=read_adapter(other)).parent


@pytest.fixture
def opened(folder: Path) -> Iterator[tuple[Any, list[str], list[str]]]:
    """The page, what its console says, and what it asks for."""
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        told: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((folder / "index.html").as_uri())
        yield page, told, asked
        browser.close()


def test_no_error_and_no_request_but_the_page_itself(opened: tuple[Any, list[str], list[str]], folder: Path) -> None:
    _, told, asked = opened
    assert told == []
    assert asked == [(folder / "index.html").as_uri()]


def test_every_figure_is_drawn_and_in_the_window(opened: tuple[Any, list[str], list[str]], folder: Path) -> None:
    page, _, _ = opened
    drawings = page.locator("figure > svg")
    assert drawings.count() == len(list(folder.glob("*.svg")))
    for place in range(drawings.count()):
        box = drawings.nth(place).bounding_box()
        assert box["width"] > 500
        assert box["height"] > 50
        assert box["x"] + box["width"] <= 1100
        assert drawings.nth(place).locator("path").count() > 3
    assert page.evaluate("document.documentElement.scrollWidth") <= 1100
    for question in QUESTIONS[:6]:
        assert page.get_by_role("heading", name=question).is_visible()


def test_the_keyboard_reaches_everything(opened: tuple[Any, list[str], list[str]], folder: Path) -> None:
    page, _, _ = opened
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    reached: list[str] = []
    for _ in range(100):
        page.keyboard.press("Tab")
        now = page.evaluate("document.activeElement.getAttribute('href') || document.activeElement.className")
        if not now:
            break
        reached.append(now)
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", now
    files = {file.name for file in folder.iterdir()} - {"index.html"}
    assert files <= set(reached)
    assert "wide" in reached
    # A link of the contents leads to its section.
    page.locator("nav a").first.focus()
    page.keyboard.press("Enter")
    assert page.url.endswith("#what-changed")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(opened: tuple[Any, list[str], list[str]], scheme: str) -> None:
    page, _, _ = opened
    page.emulate_media(color_scheme=scheme)
    colours = page.evaluate(
        """[...document.querySelectorAll('h1, h2, h3, p, figcaption, dt, dd, th, td, a')].map(e => [
            getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor])"""
    )
    for ink, paper in {tuple(pair) for pair in colours}:
        assert _contrast(ink, paper) >= 4.5, (ink, paper)  # WCAG 2.2, level AA


def test_it_prints(opened: tuple[Any, list[str], list[str]], tmp_path: Path) -> None:
    page, _, _ = opened
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    page.pdf(path=str(tmp_path / "page.pdf"))
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def _contrast(one: str, other: str) -> float:
    """The ratio of two colours' luminances, as the Web Content Accessibility Guidelines define it."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [float(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
