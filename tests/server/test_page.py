import io
import re

from PIL import Image
from starlette.testclient import TestClient

from server.draw import PALETTE


def test_the_page_is_whole_and_asks_nobody_else(client: TestClient) -> None:
    response = client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|@import|url\(", response.text)
    for name in ("drop", "sample", "threshold", "classes", "rows", "bar"):
        assert f'id="{name}"' in response.text


def test_every_part_has_a_name_for_those_who_cannot_see_it(client: TestClient) -> None:
    html = client.get("/").text
    assert '<html lang="en">' in html
    canvas = re.search(r"<canvas[^>]*>", html)
    assert canvas is not None
    assert 'role="img"' in canvas[0]
    assert "aria-label=" in canvas[0]
    assert '$("view").setAttribute("aria-label"' in html  # tells what was found, too
    for name in re.findall(r'<input id="(\w+)"', html):
        assert re.search(rf'<label for="{name}"|<label[^>]*>[^<]*<input id="{name}"', html), name
    assert len(re.findall('<th scope="col">', html)) == len(re.findall("<th[ >]", html)) == 6
    assert 'role="status" aria-live="polite"' in html


def test_no_text_from_outside_becomes_markup(client: TestClient) -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", client.get("/").text)


def test_its_policy_lets_its_own_script_run_and_nothing_from_outside(client: TestClient) -> None:
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert len(re.findall(r"'sha256-[A-Za-z0-9+/=]{44}'", policy)) == 2
    assert "unsafe-inline" not in policy
    assert "http" not in policy


def test_it_draws_in_the_colours_of_the_server(client: TestClient) -> None:
    found = re.search(r"PALETTE = \[(.*?)\]", client.get("/").text)
    assert found is not None
    assert re.findall("#[0-9a-f]{6}", found[1]) == [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in PALETTE]


def test_the_sample_is_a_picture_and_always_the_same(client: TestClient) -> None:
    first, second = client.get("/sample.jpg"), client.get("/sample.jpg")
    assert first.headers["content-type"] == "image/jpeg"
    assert first.content == second.content
    assert Image.open(io.BytesIO(first.content)).size == (640, 480)
