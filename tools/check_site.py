"""Look at the built site in a real browser: nothing overflows, and the search finds: ``make docs-look``."""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

from playwright.sync_api import Browser, sync_playwright

SITE = Path(__file__).resolve().parents[1] / "dist" / "docs"
WIDTHS = (1300, 400)
#: What is searched for, and in which language.
SEARCHES = {"en": ("start_timeout", "still the placeholder"), "ru": ("Отмена", "start_timeout")}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


def search(browser: Browser, site: Path) -> list[str]:
    """Return the words that the site's search doesn't find."""
    faults = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = browser.new_page()
    for language, words in SEARCHES.items():
        for word in words:
            page.goto(f"http://127.0.0.1:{server.server_port}/{language}/search.html?q={quote(word)}")
            found = page.locator("#search-results li")
            try:
                found.first.wait_for(timeout=20_000)
            except Exception:
                faults.append(f"{language}: the search finds no {word!r}")
    server.shutdown()
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--site", type=Path, default=SITE)
    parser.add_argument("--pictures", type=Path, help="folder for a picture of each first screen")
    options = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        print("There is no Chromium here; nothing was looked at.")
        return 0
    faults = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--disable-gpu"])
        for scheme in ("light", "dark"):
            for width in WIDTHS:
                context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
                page = context.new_page()
                for path in sorted(options.site.glob("*/*.html")):
                    page.goto(path.as_uri())
                    wide = page.evaluate("document.documentElement.scrollWidth")
                    where = f"{path.parent.name}/{path.name} at {width} px, {scheme}"
                    if wide > width:
                        faults.append(f"{where}: {wide} px wide")
                    if options.pictures and scheme == "dark":
                        page.screenshot(path=options.pictures / f"{path.parent.name}-{path.stem}-{width}.png")
                context.close()
        faults += search(browser, options.site)
        browser.close()
    print("\n".join(faults) or f"{len(list(options.site.glob('*/*.html')))} pages: nothing overflows.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
