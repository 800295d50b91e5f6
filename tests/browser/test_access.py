"""The page for everyone: without a mouse, without sight, on a phone, by night, and without motion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.browser.visit import ALL_THREE, Visit
from tests.server.fake_engine import FakeEngine

OpenPage = Callable[..., Visit]

PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}


def test_everything_is_reached_with_the_keyboard_alone(visit: OpenPage) -> None:
    page = visit()
    page.tab_to("sample")
    outline = page.page.locator("#sample").evaluate(
        "it => getComputedStyle(it).outlineStyle + getComputedStyle(it).outlineWidth"
    )
    assert outline == "solid3px"
    page.page.keyboard.press("Enter")
    found = page.summary()
    page.tab_to("threshold")
    page.page.keyboard.press("End")
    page.page.locator("#threshold-shown", has_text="0.95").wait_for()
    for _ in range(5):
        page.page.keyboard.press("ArrowLeft")
    page.page.locator("#threshold-shown", has_text="0.90").wait_for()
    page.page.keyboard.press("Home")
    page.page.locator("#rows tr").nth(2).wait_for()
    rows = page.rows()

    page.page.keyboard.press("Tab")
    assert page.page.evaluate("document.activeElement.type") == "checkbox"
    page.page.keyboard.press("Space")
    assert len(page.rows()) < len(rows)
    page.page.keyboard.press("Space")
    assert page.rows() == rows

    page.tab_to("h")
    page.page.keyboard.press("Tab")
    assert page.page.evaluate("document.activeElement.sectionRowIndex") == 0
    page.page.keyboard.press("ArrowDown")
    page.page.keyboard.press("Enter")
    selected = page.page.locator('#rows [aria-selected="true"]')
    assert selected.evaluate("it => [it.sectionRowIndex, it === document.activeElement]") == [1, True]
    page.page.keyboard.press("Tab")
    assert page.focused() == "save-picture", "one Tab leads past the rows"
    assert found


def test_what_is_found_is_read_out(visit: OpenPage, picture: Path) -> None:
    page = visit()
    assert page.page.locator("#announce").get_attribute("aria-live") == "polite"
    page.choose(picture)
    page.page.locator("#announce", has_text="2 found: 1 red, 1 green").wait_for(state="attached")
    page.set_threshold("0.7")
    page.page.locator("#announce", has_text="1 found: 1 red").wait_for(state="attached")
    unnamed = page.page.evaluate(
        """[...document.querySelectorAll("input, button, a")]
            .filter((each) => !(each.labels?.length || each.innerText.trim() || each.ariaLabel))
            .map((each) => each.outerHTML)"""
    )
    assert unnamed == []


def test_a_phone_shows_it_whole_with_room_for_fingers(visit: OpenPage, picture: Path) -> None:
    page = visit(**PHONE)

    def overflow() -> int:
        pixels: int = page.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        return pixels

    def small() -> list[str]:
        targets: list[str] = page.page.evaluate(
            """[...document.querySelectorAll("button, .button, .chip, .check, summary, a, #threshold, #rows tr")]
                .map((each) => [each, each.getBoundingClientRect()])
                .filter(([, box]) => box.width && (box.height < 44 || box.width < 44))
                .map(([each, box]) => `${each.outerHTML.slice(0, 60)} ${box.width}x${box.height}`)"""
        )
        return targets

    assert (overflow(), small()) == (0, [])
    assert page.page.get_by_text("Use the camera").is_visible()
    long_name = picture.rename(picture.with_name("a-rather-long-name-" * 8 + ".png"))
    page.choose(long_name)
    page.summary()
    page.set_threshold(ALL_THREE)
    assert (overflow(), small()) == (0, [])
    broken = picture.with_name("broken.png")
    broken.write_bytes(b"\0" * 300)
    page.choose(broken)
    page.problem()
    assert (overflow(), small()) == (0, [])


# Every text's contrast with the nearest opaque colour behind it: WCAG 2 wants 4.5, or 3 for large letters.
POOR_CONTRAST = """() => {
  const paper = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const read = (color) => {
    paper.clearRect(0, 0, 1, 1);
    paper.fillStyle = color;
    paper.fillRect(0, 0, 1, 1);
    return [...paper.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (color) => color.slice(0, 3).map((value) => value / 255)
    .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, at) => sum + value * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (it) => {
    for (; it; it = it.parentElement) {
      const color = read(getComputedStyle(it).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255];
  };
  const hasText = (it) => [...it.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  const isRead = (it) => hasText(it) && it.checkVisibility() && !it.disabled;
  const texts = [...document.querySelectorAll("body *")].filter(isRead);
  const contrasts = texts.map((it) => {
    const style = getComputedStyle(it);
    const [more, less] = [luminance(read(style.color)), luminance(behind(it))].sort((a, b) => b - a);
    const contrast = (more + 0.05) / (less + 0.05), least = parseFloat(style.fontSize) >= 24 ? 3 : 4.5;
    return [contrast >= least, `${it.outerHTML.slice(0, 80)} ${contrast.toFixed(2)}`];
  });
  return [texts.length, contrasts.filter(([enough]) => !enough).map(([, text]) => text)];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_by_day_and_by_night(visit: OpenPage, picture: Path, scheme: str) -> None:
    page = visit(color_scheme=scheme)

    def poor() -> list[str]:
        looked_at, found = page.page.evaluate(POOR_CONTRAST)
        assert looked_at > 10
        return list(found)

    page.page.locator("summary").click()
    assert poor() == []
    page.choose(picture)
    page.summary()
    page.page.get_by_role("checkbox", name="red").uncheck()
    assert poor() == []
    note = picture.with_name("note.txt")
    note.write_bytes(b"no picture")
    page.choose(note)
    page.problem()
    assert poor() == []
    assert page.page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(243, 246, 245)" if scheme == "light" else "rgb(13, 19, 18)"
    )


def test_nothing_moves_for_those_who_asked_for_calm(visit: OpenPage, picture: Path, engine: FakeEngine) -> None:
    page = visit(reduced_motion="reduce")
    engine.gate.clear()
    page.choose(picture)
    page.page.locator('body[data-state="busy"]').wait_for()
    name = page.page.locator("#frame").evaluate("it => getComputedStyle(it, '::after').animationName")
    engine.gate.set()
    assert name == "none"
    page.summary()
