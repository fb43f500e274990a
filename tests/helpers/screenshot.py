"""Pictures of the search page.

    python -m helpers.screenshot --url http://127.0.0.1:8000 --query "a red circle on grass" --output figure/search.png

run in tests/, or with tests/ on PYTHONPATH. --dark, --width, --height, --phone and --language change how it is seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from urllib.parse import quote

from .browser import PHONE, missing, open_browser


def take_screenshot(
    url: str,
    output: Path,
    query: str = "",
    *,
    width: int = 1280,
    height: int = 840,
    dark: bool = False,
    phone: bool = False,
    language: str = "en-US",
) -> None:
    """Open the page at `url`, search for `query` (a text, or parameters such as row=3&q=blue) and write a PNG."""
    parameters = query if "=" in query else f"q={quote(query)}" if query else ""
    seen = PHONE if phone else {"viewport": {"width": width, "height": height}}
    with open_browser() as browser:
        context = browser.new_context(color_scheme="dark" if dark else "light", locale=language, **seen)
        page = context.new_page()
        page.goto(f"{url.rstrip('/')}/?{parameters}")
        page.wait_for_selector(".tile img.shown")
        page.wait_for_load_state("networkidle")
        page.evaluate("document.activeElement.blur()")
        page.wait_for_timeout(600)  # pictures fade in
        page.screenshot(path=str(output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="of a server that runs")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("--query", default="", help="a text, or parameters: row=3&q=blue")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=840)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--phone", action="store_true")
    parser.add_argument("--language", default="en-US")
    if why := missing():
        parser.error(why)
    chosen = vars(parser.parse_args())
    take_screenshot(chosen.pop("url"), chosen.pop("output"), chosen.pop("query"), **chosen)


if __name__ == "__main__":
    main()
