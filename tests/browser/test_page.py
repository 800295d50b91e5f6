"""The page at `/` in a real browser, as visitors use it."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from server.app import create_app
from server.settings import Settings
from tests.browser.visit import ALL_THREE, PLACES, Visit, serving
from tests.server.fake_engine import FakeEngine
from tests.server.pictures import HEIGHT, WIDTH

OpenPage = Callable[..., Visit]

# --- ways in ---


def test_it_says_what_the_model_is_and_asks_for_nothing_more(visit: OpenPage) -> None:
    page = visit()
    about = page.page.locator("#about").inner_text()
    assert "bright" in about
    assert "red, green, and blue" in about
    assert [url.removeprefix(page.url) for url in page.requests if not url.startswith("data:")] == ["", "model"]


def test_a_chosen_file_is_looked_at(visit: OpenPage, picture: Path) -> None:
    page = visit()
    page.choose(picture)
    assert page.summary() == "2 found: 1 red, 1 green"
    assert page.rows() == [
        ["red", "0.90", "12", "8", "48", "24"],
        ["green", "0.60", "64", "36", "28", "24"],
    ]
    assert page.page.locator("#photo").get_attribute("alt") == "three.png. 2 found: 1 red, 1 green"
    assert page.detections_asked() == 1


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_a_file_is_dropped_or_pasted(visit: OpenPage, picture: Path, how: str) -> None:
    page = visit()
    page.page.evaluate(
        """([how, name, content]) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(content), (each) => each.charCodeAt(0));
            transfer.items.add(new File([bytes], name, { type: "image/png" }));
            const options = { bubbles: true, cancelable: true, dataTransfer: transfer, clipboardData: transfer };
            const event = how === "drop" ? new DragEvent("drop", options) : new ClipboardEvent("paste", options);
            document.getElementById("picture").dispatchEvent(event);
        }""",
        [how, picture.name, base64.b64encode(picture.read_bytes()).decode()],
    )
    assert page.summary() == "2 found: 1 red, 1 green"


def test_a_picture_on_the_clipboard_is_pasted_with_the_keyboard(visit: OpenPage, picture: Path) -> None:
    page = visit()
    page.page.evaluate(
        """async (content) => {
            const bytes = Uint8Array.from(atob(content), (each) => each.charCodeAt(0));
            const blob = new Blob([bytes], { type: "image/png" });
            await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }""",
        base64.b64encode(picture.read_bytes()).decode(),
    )
    page.page.keyboard.press("Control+v")
    assert page.summary() == "2 found: 1 red, 1 green"


def test_the_sample_is_looked_at_and_named(visit: OpenPage) -> None:
    page = visit()
    page.page.get_by_role("button", name="Try the sample").click()
    assert "found" in page.summary()
    assert page.page.locator("#photo").evaluate("photo => [photo.naturalWidth, photo.naturalHeight]") == [640, 480]


def test_a_file_with_the_wrong_ending_is_looked_at_all_the_same(visit: OpenPage, picture: Path) -> None:
    page = visit()
    page.choose(picture.rename(picture.with_suffix(".jpg")))
    assert page.summary() == "2 found: 1 red, 1 green"


def test_a_format_that_no_browser_shows_is_shown_by_the_server(visit: OpenPage, picture: Path) -> None:
    path = picture.with_suffix(".tiff")
    Image.open(picture).save(path)
    page = visit()
    page.choose(path)
    assert page.summary() == "2 found: 1 red, 1 green"
    assert page.page.locator("#photo").evaluate("photo => photo.naturalWidth") == WIDTH
    assert page.page.locator("#stage").is_visible()


def test_a_newer_picture_takes_the_place_of_one_that_is_still_looked_at(
    visit: OpenPage, picture: Path, engine: FakeEngine
) -> None:
    page = visit()
    engine.gate.clear()
    page.choose(picture)
    page.page.locator('body[data-state="busy"]').wait_for()
    only_red = picture.with_name("red.png")
    Image.new("RGB", (WIDTH, HEIGHT), (255, 0, 0)).save(only_red)
    page.choose(only_red)
    engine.gate.set()
    assert page.summary() == "1 found: 1 red"
    assert page.page.locator("#problem").is_hidden()


def test_waiting_can_be_given_up_and_taken_up_again(visit: OpenPage, picture: Path, engine: FakeEngine) -> None:
    page = visit()
    engine.gate.clear()
    page.choose(picture)
    page.page.get_by_role("button", name="Cancel").click()
    assert "Cancelled." in page.problem()
    engine.gate.set()
    page.page.get_by_role("button", name="Try again").click()
    assert page.summary() == "2 found: 1 red, 1 green"


# --- filters, table, picture ---


def test_threshold_and_classes_act_at_once_and_ask_nobody(visit: OpenPage, picture: Path) -> None:
    page = visit()
    page.choose(picture)
    page.summary()
    asked = len(page.requests)
    page.set_threshold(ALL_THREE)
    assert page.labels() == ["red", "green", "blue"]
    page.page.get_by_role("checkbox", name="red").uncheck()
    assert page.labels() == ["green", "blue"]
    assert page.summary() == "2 found: 1 green, 1 blue"
    page.set_threshold("0.95")
    assert page.labels() == []
    assert "lower the threshold" in page.page.locator("#nothing").inner_text()
    page.page.get_by_role("checkbox", name="red").check()
    page.set_threshold("0.9")
    assert page.labels() == ["red"]
    assert len(page.requests) == asked


def test_the_overlay_follows_the_filters_and_the_labels_can_go(visit: OpenPage, picture: Path) -> None:
    page = visit()
    page.choose(picture)
    page.summary()
    seen = [page.overlay_sum()]
    page.page.get_by_role("checkbox", name="Labels").uncheck()
    seen.append(page.overlay_sum())
    page.set_threshold(ALL_THREE)
    seen.append(page.overlay_sum())
    page.page.get_by_role("checkbox", name="red").uncheck()
    seen.append(page.overlay_sum())
    assert len(set(seen)) == 4


def test_the_table_is_sorted_by_any_column(visit: OpenPage, picture: Path) -> None:
    page = visit()
    page.choose(picture)
    page.summary()
    page.set_threshold(ALL_THREE)
    by_x = page.page.get_by_role("button", name="x, left edge")
    by_x.click()
    assert page.labels() == ["green", "red", "blue"]
    assert by_x.locator("..").get_attribute("aria-sort") == "descending"
    by_x.click()
    assert page.labels() == ["blue", "red", "green"]
    assert by_x.locator("..").get_attribute("aria-sort") == "ascending"
    page.page.get_by_role("button", name="Class", exact=True).click()
    assert page.labels() == ["blue", "green", "red"]
    assert page.page.locator("[aria-sort]").count() == 1


def test_a_row_lights_its_box_and_a_box_its_row(visit: OpenPage, picture: Path) -> None:
    page = visit()
    page.choose(picture)
    page.summary()
    calm = page.overlay_sum()
    page.page.locator("#rows tr").nth(1).hover()
    assert page.overlay_sum() != calm
    page.page.locator("h1").hover()
    assert page.overlay_sum() == calm

    overlay = page.page.locator("#overlay").bounding_box()
    assert overlay is not None
    x0, y0, x1, y1 = PLACES["green"]
    scale = overlay["width"] / WIDTH
    page.page.mouse.move(overlay["x"] + (x0 + x1) / 2 * scale, overlay["y"] + (y0 + y1) / 2 * scale)
    assert page.page.locator("#rows .lit").inner_text().startswith("green")
    page.page.mouse.down()
    page.page.mouse.up()
    page.page.locator("h1").hover()
    assert page.page.locator('#rows [aria-selected="true"]').inner_text().startswith("green"), "a click keeps it"


def test_the_bar_and_its_legend_tell_the_same_times(visit: OpenPage, picture: Path) -> None:
    page = visit()
    page.choose(picture)
    page.summary()
    rows = [row.locator("td").all_inner_texts() for row in page.page.locator("#stages tr").all()]
    names = [name.split()[0] for name, _ in rows]
    assert names[0] == "admit"
    assert {"decode", "preprocess", "queue", "inference", "postprocess"} <= set(names)
    assert names[-1] == "elsewhere"
    times = [float(time.removesuffix(" ms")) for _, time in rows]
    total = float(page.page.locator("#total").inner_text().removesuffix(" ms"))
    assert sum(times) == pytest.approx(total, abs=0.5 + 0.05 * len(times))
    widths = [span.bounding_box() for span in page.page.locator("#bar span").all()]
    assert len(widths) == len(times)
    longest = max(range(len(times)), key=times.__getitem__)
    assert max(range(len(widths)), key=lambda at: widths[at]["width"]) == longest  # type: ignore[index]


# --- what is taken along ---


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("name", ["three.png", 'it\'s "a"; $(touch pwned) `b`, [1-3] {x,y} \\ ü.png', "-", "@a=b.png"])
def test_the_command_finds_what_the_page_shows(visit: OpenPage, picture: Path, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    file = picture.rename(folder / name)
    page = visit()
    page.choose(file)
    page.summary()
    page.set_threshold(ALL_THREE)
    page.page.get_by_role("checkbox", name="red").uncheck()
    page.page.get_by_role("button", name="Copy as curl").click()
    page.page.get_by_role("button", name="Copied").wait_for()
    command = page.page.evaluate("navigator.clipboard.readText()")
    done = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, text=True, check=True)
    detections = json.loads(done.stdout)["images"][0]["detections"]
    assert [each["label"] for each in detections] == page.labels() == ["green", "blue"]
    assert sorted(path.name for path in folder.iterdir()) == [name]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_command_for_the_sample_needs_no_file(visit: OpenPage, tmp_path: Path) -> None:
    page = visit()
    page.page.get_by_role("button", name="Try the sample").click()
    page.summary()
    command = page.page.locator("#curl").inner_text()
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    detections = json.loads(done.stdout)["images"][0]["detections"]
    assert [each["label"] for each in detections] == page.labels()


def test_json_and_picture_are_saved_as_they_are_shown(visit: OpenPage, picture: Path) -> None:
    page = visit()
    page.choose(picture)
    page.summary()
    page.page.get_by_role("checkbox", name="red").uncheck()
    with page.page.expect_download() as saving:
        page.page.get_by_role("button", name="Save JSON").click()
    assert saving.value.suggested_filename == "three.json"
    answer = json.loads(saving.value.path().read_text())
    assert answer["model"] == {"name": "bright", "version": "7"}
    (image,) = answer["images"]
    assert (image["width"], image["height"]) == (WIDTH, HEIGHT)
    assert [each["label"] for each in image["detections"]] == ["green"]

    with page.page.expect_download() as saving:
        page.page.get_by_role("button", name="Save picture").click()
    assert saving.value.suggested_filename == "three-boxes.png"
    drawn = Image.open(saving.value.path()).convert("RGB")
    before = Image.open(picture)
    assert drawn.size == before.size
    x0, y0, x1, y1 = PLACES["green"]
    assert drawn.getpixel((x1, (y0 + y1) // 2)) != before.getpixel((x1, (y0 + y1) // 2))
    x0, y0, x1, y1 = PLACES["red"]
    assert drawn.getpixel((x0, (y0 + y1) // 2)) == (255, 0, 0), "a class that is not shown is not drawn"


# --- trouble, in words ---


def test_what_is_no_picture_is_told_and_what_is_shown_stays(visit: OpenPage, picture: Path) -> None:
    page = visit()
    page.choose(picture)
    page.summary()
    note = picture.with_name("note.pdf")
    note.write_bytes(b"%PDF-1.7")
    page.choose(note)
    assert "note.pdf is not a picture." in page.problem()
    assert page.summary() == "2 found: 1 red, 1 green"
    assert page.detections_asked() == 1


def test_what_is_no_file_is_told_with_what_to_do(visit: OpenPage) -> None:
    page = visit()
    page.page.evaluate(
        """navigator.clipboard.writeText("https://example.org/picture.png")
            .then(() => document.getElementById("sample").focus())"""
    )
    page.page.keyboard.press("Control+v")
    assert "There is no picture on the clipboard." in page.problem()
    page.page.evaluate(
        """() => {
            const dataTransfer = new DataTransfer();
            dataTransfer.setData("text/uri-list", "https://example.org/picture.png");
            document.body.dispatchEvent(new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer }));
        }"""
    )
    assert "nothing is fetched from elsewhere" in page.problem()
    assert page.detections_asked() == 0


def test_a_broken_file_is_told_with_what_to_do(visit: OpenPage, picture: Path) -> None:
    page = visit()
    broken = picture.with_name("broken.png")
    broken.write_bytes(picture.read_bytes()[:150])
    page.choose(broken)
    told = page.problem()
    assert "ends before the picture does" in told
    assert "download it again" in told
    assert "The server says: " in told
    assert page.page.get_by_role("button", name="Try again").is_hidden(), "it would be refused again"
    page.choose(picture)
    assert page.summary() == "2 found: 1 red, 1 green"
    assert page.page.locator("#problem").is_hidden()


def test_a_busy_server_is_told_with_when_to_come_back(visit: OpenPage, picture: Path) -> None:
    page = visit()
    body = json.dumps({"error": {"code": "queue_full", "message": "128 images are waiting"}, "request_id": "a"})
    page.page.route("**/detect?*", lambda route: route.fulfill(status=429, headers={"Retry-After": "3"}, body=body))
    page.choose(picture)
    assert "Try again in about 3 s." in page.problem()
    page.page.unroute("**/detect?*")
    page.page.get_by_role("button", name="Try again").click()
    assert page.summary() == "2 found: 1 red, 1 green"


def test_a_server_that_is_gone_is_told(visit: OpenPage, picture: Path) -> None:
    page = visit()
    page.page.route("**/detect?*", lambda route: route.abort())
    page.choose(picture)
    assert "The server did not answer." in page.problem()


def test_a_key_is_asked_for_used_and_not_kept(visit: OpenPage, picture: Path, engine: FakeEngine) -> None:
    settings = Settings(bundle=Path("no-bundle"), api_keys="first,schlüssel", open_pages=True)
    with serving(create_app(settings, engine)) as url:
        page = visit(url)
        page.page.locator("#key-form").wait_for()
        assert page.focused() == "key"
        page.page.keyboard.type("wrong")
        page.page.keyboard.press("Enter")
        page.page.get_by_text("does not know that key").wait_for()
        assert page.focused() == "key"
        page.page.locator("#key").fill("schlüssel")
        page.page.keyboard.press("Enter")
        page.page.locator("#about", has_text="bright").wait_for()  # the form goes before the answer is here
        assert page.page.locator("#key-form").is_hidden()
        assert page.page.locator("#problem").is_hidden()
        page.choose(picture)
        assert page.summary() == "2 found: 1 red, 1 green"
        command = page.page.locator("#curl").inner_text()
        assert '-H "Authorization: Bearer $API_KEY"' in command
        assert "schlüssel" not in page.page.content()
        kept = page.page.evaluate("[localStorage.length, sessionStorage.length, document.cookie, location.href]")
        assert kept == [0, 0, "", url]
        page.page.reload()
        page.page.locator("#key-form").wait_for()
