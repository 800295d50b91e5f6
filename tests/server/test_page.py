import gzip
import io
import re

from PIL import Image
from starlette.testclient import TestClient

from server.app import create_app
from server.draw import PALETTE
from server.page import assemble_page, content_policy
from server.settings import Settings
from tests.server.fake_engine import FakeEngine

# What it looks like and how it behaves is in tests/browser.


def test_the_page_is_whole_and_asks_nobody_else(client: TestClient) -> None:
    response = client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|@import|url\(", response.text)
    assert '<script src="' not in response.text
    assert 'rel="stylesheet"' not in response.text
    for name in ("drop", "sample", "threshold", "classes", "rows", "bar", "key"):
        assert f'id="{name}"' in response.text


def test_every_part_has_a_name_for_those_who_cannot_see_it(client: TestClient) -> None:
    html = client.get("/").text
    assert '<html lang="en">' in html
    assert len(re.findall('<th scope="col">', html)) == len(re.findall("<th[ >]", html)) == 6
    assert 'role="status" aria-live="polite"' in html
    for labelled in re.findall(r'aria-(?:labelledby|describedby)="([\w -]+)"', html):
        assert all(f'id="{name}"' in html for name in labelled.split())


def test_no_text_from_outside_becomes_markup(client: TestClient) -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", client.get("/").text)


def test_its_policy_lets_its_own_script_run_and_nothing_from_outside(client: TestClient) -> None:
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    inlined = len(re.findall(r"<(?:script|style)>", response.text))
    assert len(re.findall(r"'sha256-[A-Za-z0-9+/=]{44}'", policy)) == inlined > 2
    assert "unsafe" not in policy
    assert "http" not in policy


def test_a_script_that_is_changed_is_not_covered_by_the_policy() -> None:
    html = assemble_page()
    assert content_policy(html) != content_policy(html.replace('"use strict";', '"use strict"; ', 1))


def test_it_comes_packed_and_only_when_it_has_changed(client: TestClient) -> None:
    plain = client.get("/", headers={"Accept-Encoding": "identity"})
    with client.stream("GET", "/", headers={"Accept-Encoding": "gzip"}) as packed:
        content = b"".join(packed.iter_raw())
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(content) == plain.content
    assert len(content) < len(plain.content) / 2
    again = client.get("/", headers={"If-None-Match": plain.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == plain.headers["content-security-policy"]


def test_it_can_be_reached_without_a_key_where_one_is_needed(settings: Settings, engine: FakeEngine) -> None:
    locked = settings.model_copy(update={"api_keys": Settings(api_keys="secret").api_keys, "open_pages": True})
    with TestClient(create_app(locked, engine)) as client:
        assert client.get("/").status_code == 200
        assert client.get("/sample.jpg").status_code == 200
        assert client.get("/model").status_code == 401


def test_it_draws_in_the_colours_of_the_server(client: TestClient) -> None:
    found = re.search(r"PALETTE = \[(.*?)\]", client.get("/").text)
    assert found is not None
    assert re.findall("#[0-9a-f]{6}", found[1]) == [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in PALETTE]


def test_the_sample_is_a_picture_and_always_the_same(client: TestClient) -> None:
    first, second = client.get("/sample.jpg"), client.get("/sample.jpg")
    assert first.headers["content-type"] == "image/jpeg"
    assert first.content == second.content
    assert Image.open(io.BytesIO(first.content)).size == (640, 480)
