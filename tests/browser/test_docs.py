"""/docs, as a browser runs it under its policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.app import create_app
from server.settings import Settings
from tests.browser.visit import PATIENCE_MS, REMEMBER_VIOLATIONS, serving
from tests.server.fake_engine import FakeEngine

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def test_docs_ask_for_the_key_and_are_tried_out_with_it(browser: Browser) -> None:
    app = create_app(Settings(api_keys="the-key", open_pages=True), FakeEngine())
    with serving(app) as url, browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        asked: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.add_init_script(REMEMBER_VIOLATIONS)
        page.goto(url + "docs")
        page.locator("#why", has_text="this server needs an API key").wait_for()
        page.locator("#key").fill("wrong")
        page.keyboard.press("Enter")
        page.locator("#why", has_text="this server needs an API key").wait_for()
        page.locator("#key").fill("the-key")
        page.keyboard.press("Enter")
        model = page.locator(".opblock", has_text="/model")
        model.locator("button").first.click()
        assert page.locator("#ask").is_hidden()
        model.get_by_role("button", name="Try it out").click()
        model.get_by_role("button", name="Execute").click()
        model.locator(".live-responses-table", has_text='"bright"').wait_for()
        assert page.evaluate("window.violations") == []
        assert errors == []
        assert not [each for each in asked if not each.startswith((url, "data:", "blob:"))]
        assert page.evaluate("localStorage.length + sessionStorage.length") == 0
        assert "the-key" not in page.url
