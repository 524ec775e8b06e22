"""A browser to look at pages with: Debian's Chromium, driven through Playwright.

An installed one is taken, else the package is unpacked in the user's cache and runs with its own
libraries and fonts. Playwright's download of a browser is neither needed nor wanted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from debian import NoPackageError, libraries, unpack

LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
"""What pages are looked at on."""
_PACKAGES = ("chromium", "fonts-dejavu-core")
_NEEDED = r"lib(?!llvm|z3|gl1-mesa|drm-)|chromium|fontconfig-config|fonts-dejavu-core"
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_FONTS = """\
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "urn:fontconfig:fonts.dtd">
<fontconfig>
  <dir>/usr/share/fonts</dir>
  <dir>{root}/usr/share/fonts</dir>
  <cachedir>{root}/var/cache/fontconfig</cachedir>
  <alias><family>sans-serif</family><prefer><family>DejaVu Sans</family></prefer></alias>
  <alias><family>monospace</family><prefer><family>DejaVu Sans Mono</family></prefer></alias>
</fontconfig>
"""


def find() -> tuple[Path, dict[str, str]]:
    """Chromium's program, and the environment that it runs in.

    Raises:
        NoPackageError: where none is installed and Debian's package cannot be had.
    """
    installed = shutil.which("chromium")
    if installed is not None:
        return Path(installed), dict(os.environ)
    root = unpack("chromium", _PACKAGES, _NEEDED)
    found = libraries(root)
    # What lies deeper is found by paths that hold for installed packages only.
    found += [folder / below for folder in found for below in ("nss", "pulseaudio")]
    fonts = root / "fonts.conf"
    fonts.write_text(_FONTS.format(root=root))
    program = root / "usr" / "lib" / "chromium" / "chromium"
    return program, {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(map(str, found)),
        "FONTCONFIG_FILE": str(fonts),
        "CHROME_WRAPPER": str(program),
    }


@contextmanager
def run_browser() -> Iterator[Any]:
    """A Playwright `Browser` with a new, empty profile.

    Raises:
        NoPackageError: where there is no Chromium.
    """
    from playwright.sync_api import sync_playwright

    program, environment = find()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=_ARGUMENTS, env=environment
        )
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def need_browser() -> Iterator[Any]:
    """`run_browser` for tests, which are skipped where there is no Chromium."""
    with ExitStack() as stack:
        try:
            browser = stack.enter_context(run_browser())
        except NoPackageError as error:
            pytest.skip(str(error))
        yield browser


@contextmanager
def open_page(browser: Any, path: Path, **options: Any) -> Iterator[Any]:
    """A file as a page, which must load nothing and say nothing on the console."""
    said: list[str] = []
    context = browser.new_context(**{"viewport": LAPTOP, **options})
    page = context.new_page()
    page.set_default_timeout(5000)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url))
    page.goto(path.as_uri())
    try:
        yield page
        assert said == [path.as_uri()]
    finally:
        context.close()


def read_fifth_token(page: Any) -> tuple[Any, Any]:
    """Go to the fourth token of the first document by pointer, and on by arrow key.

    Returns where its tokens are, and where the page tells of the one that is read.
    """
    article = page.locator("article").first
    tokens, readout = article.locator(".tokens"), article.locator(".readout")
    tokens.locator("span").nth(3).click()
    assert readout.inner_text().startswith("Token 4 ")
    tokens.focus()
    page.keyboard.press("ArrowRight")
    return tokens, readout
