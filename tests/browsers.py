"""A real Chromium for the tests: `open_page` opens pages in it, and fails where a page's program does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

KNOWN = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, from MARTEN_CHROMIUM or the PATH."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright: requirements-dev.txt")
    found = os.environ.get("MARTEN_CHROMIUM") or next(filter(None, map(shutil.which, KNOWN)), None)
    if found is None:
        pytest.skip("needs a browser: install chromium, or name one with MARTEN_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open an address: `open_page(url, **options)`, options as of playwright's `new_context`."""
    contexts, errors = [], []

    def opened(url: str, **options: Any) -> Any:
        context = browser.new_context(**options)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []
