"""/admin/bundle's door: who may come in, what may be asked for, and where a path may lead."""

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.settings import Settings
from tests.server.fake_engine import FakeEngine
from tests.server.swap_site import FIRST, KEY, SwapSite, run

ADMIN = "/admin/bundle"


def error(response: httpx2.Response) -> tuple[int, str, str]:
    content = response.json()
    return response.status_code, content["error"]["code"], content["error"]["message"]


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("path", [ADMIN, "/admin/", "/admin/else"])
@pytest.mark.parametrize("headers", [{}, KEY, {"Authorization": "Bearer secret"}])
def test_without_admin_keys_it_is_closed_and_says_how_to_open_it(
    method: str, path: str, headers: dict[str, str]
) -> None:
    settings = Settings(bundle=Path("none"), api_keys="secret")  # type: ignore[arg-type]
    client = TestClient(create_app(settings, FakeEngine()))
    status, code, message = error(client.request(method, path, headers=headers))  # type: ignore[arg-type]
    assert (status, code) == (403, "admin_disabled")
    assert "DDETR_ADMIN_KEYS" in message


def test_an_admin_key_is_needed_and_no_other_key_will_do() -> None:
    async def test(site: SwapSite) -> None:
        for headers in ({}, {"X-API-Key": "public"}, {"Authorization": "Bearer secre"}, {"X-API-Key": ""}):
            for method in ("GET", "POST", "DELETE"):
                response = await site.client.request(method, ADMIN, headers=headers, json={"path": "/bundles/8"})
                assert error(response)[:2] == (401, "unauthorized")
        assert not site.swaps.history
        assert (await site.client.get("/model", headers=KEY)).status_code == 401, "nor is an admin key an API key"
        bearer = {"Authorization": "Bearer secret"}
        assert (await site.client.get(ADMIN, headers=bearer)).status_code == 200

    run(test, api_keys="public")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "body"),
        (b"null", "body"),
        (b"[]", "body"),
        (b"{", "body"),
        (b"{}", "path"),
        (b'{"path": ""}', "path"),
        (b'{"path": 8}', "path"),
        (b'{"path": "/a\\u0000b"}', "path"),
        (json.dumps({"path": "/" + "a" * 5000}).encode(), "path"),
        (b'{"path": "/a", "pth": 1}', "pth"),
        (b'{"path": "/a", "shadow_percent": 101}', "shadow_percent"),
        (b'{"path": "/a", "shadow_percent": NaN}', ""),
        (b'{"path": "/a", "shadow_seconds": 0}', "shadow_seconds"),
        (b'{"path": "/a", "shadow_seconds": 1e9}', "shadow_seconds"),
        (b'{"path": "/a", "min_agreement": -1}', "min_agreement"),
        (b"\xff", "body"),
        (b"[" * 60_000, "body"),
    ],
)
def test_what_cannot_be_meant_is_400(body: bytes, said: str) -> None:
    async def test(site: SwapSite) -> None:
        status, code, message = error(await site.client.post(ADMIN, content=body, headers=KEY))
        assert (status, code) == (400, "bad_body")
        assert said in message
        assert not site.swaps.history

    run(test)


def test_a_large_body_is_not_read() -> None:
    async def test(site: SwapSite) -> None:
        assert error(await site.client.post(ADMIN, content=bytes(65537), headers=KEY))[:2] == (413, "too_many_bytes")

    run(test)


@pytest.mark.parametrize("query", ["wait=yes", "wait=", "wait=1", "now=true", "wait=true&x=1"])
def test_parameters_that_are_none_are_400(query: str) -> None:
    async def test(site: SwapSite) -> None:
        response = await site.client.post(f"{ADMIN}?{query}", json={"path": "/a"}, headers=KEY)
        assert error(response)[:2] == (400, "bad_parameter")
        assert not site.swaps.history

    run(test)


@pytest.mark.parametrize(
    "path", ["../outside", "/etc", "a/../../outside", "..", "/bundles/../etc", "./../", "~/x/../../.."]
)
def test_a_path_out_of_bundle_root_is_403(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    root.mkdir()

    async def test(site: SwapSite) -> None:
        status, code, message = error(await site.begin(path))
        assert (status, code) == (403, "path_forbidden")
        assert "bundle_root" in message
        assert not site.swaps.history

    run(test, bundle_root=root)


@pytest.mark.parametrize("path", ["8", "./8", "x/../8", "{root}/8", "link/8"])
def test_a_path_below_bundle_root_is_taken(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    (root / "8").mkdir(parents=True)
    (root / "link").symlink_to(root)

    async def test(site: SwapSite) -> None:
        assert (await site.swap(path.format(root=root))).status_code == 200
        assert (await site.state())["in_service"]["path"] == str(root / "8")

    run(test, bundle_root=root)


def test_a_link_out_of_bundle_root_is_not_followed(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside" / "8"
    root.mkdir()
    outside.mkdir(parents=True)
    (root / "there").symlink_to(outside.parent)
    (root / "round").symlink_to(root / "round")

    async def test(site: SwapSite) -> None:
        for path in ("there/8", "there"):
            answer = await site.swap(path)
            assert answer.status_code == 422
            assert "leads out of bundle_root" in error(answer)[2]
        assert (await site.swap("round")).status_code == 422
        assert site.bundles.count == 0
        assert await site.version() == FIRST

    run(test, bundle_root=root)


def test_a_root_that_is_a_link_itself_is_one(tmp_path: Path) -> None:
    (tmp_path / "real" / "8").mkdir(parents=True)
    (tmp_path / "root").symlink_to(tmp_path / "real")

    async def test(site: SwapSite) -> None:
        assert (await site.swap("8")).status_code == 200

    run(test, bundle_root=tmp_path / "root")


@pytest.mark.parametrize("path", ["bundles/8", "http://host/bundle", "file:///bundles/8"])
def test_without_a_root_a_path_is_absolute_and_no_url(path: str) -> None:
    async def test(site: SwapSite) -> None:
        assert error(await site.begin(path))[:2] == (403, "path_forbidden")

    run(test)


def test_the_state_is_told_while_nothing_has_been_swapped() -> None:
    async def test(site: SwapSite) -> None:
        state: dict[str, Any] = await site.state()
        assert state["swaps"] == []
        assert state["busy"] is False
        assert state["in_service"]["model"] == {"name": "bright", "version": FIRST}
        assert state["in_service"]["gate"][0]["result"] == "not asked"

    run(test)


def test_the_schema_knows_it_only_where_it_is_open() -> None:
    closed = create_app(Settings(bundle=Path("none")), FakeEngine()).openapi()
    opened = create_app(Settings(bundle=Path("none"), admin_keys="secret"), FakeEngine()).openapi()  # type: ignore[arg-type]
    assert ADMIN not in closed["paths"]
    assert set(opened["paths"][ADMIN]) == {"get", "post", "delete"}


def test_no_key_shows_in_the_settings() -> None:
    assert "secret" not in repr(Settings(bundle=Path("none"), admin_keys="secret"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no key in it"):
        Settings(bundle=Path("none"), admin_keys="")  # type: ignore[arg-type]
