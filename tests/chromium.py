"""A browser to look at pages with: Debian's Chromium, driven through Playwright.

An installed one is taken, else the package is unpacked in the user's cache and runs with its own
libraries and fonts. Playwright's download of a browser is neither needed nor wanted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from debian import libraries, unpack

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
