"""Pictures of the search page.

    python -m helpers.screenshot --url http://127.0.0.1:8000 --query "a red circle on grass" --output page.png
    python -m helpers.screenshot --query "a red circle on grass" --output page.png -- --images FOLDER --checkpoint RUN

run in tests/, or with tests/ on PYTHONPATH; what comes after -- is for `serve`, which is started then. --dark, --width,
--height, --phone and --language change how it is seen.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from .browser import PHONE, missing, open_browser


def take_screenshot(
    url: str,
    output: Path,
    query: str = "",
    *,
    width: int = 1280,
    height: int = 800,
    dark: bool = False,
    phone: bool = False,
    language: str = "en-US",
) -> None:
    """Open the page at `url`, search for `query` (a text, or parameters such as row=3&q=blue) and write a PNG of 256
    colors, a quarter of the size."""
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
        seen = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    seen.quantize(256, method=Image.Quantize.MEDIANCUT).save(output, optimize=True)


@contextlib.contextmanager
def serving(arguments: list[str]) -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, "-m", "rwkv_clip.search", "serve", *arguments, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = next((line for line in process.stdout if line.startswith("http")), "").strip()
            if not address:
                raise SystemExit(f"serve ended with {process.wait()}")
            yield address
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a server that runs")
    parser.add_argument("serve", nargs="*", metavar="-- ARGUMENT ..", help="start one, with these arguments")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("--query", default="", help="a text, or parameters: row=3&q=blue")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--phone", action="store_true")
    parser.add_argument("--language", default="en-US")
    if why := missing():
        parser.error(why)
    chosen = vars(parser.parse_args())
    url, arguments = chosen.pop("url"), chosen.pop("serve")
    if bool(url) == bool(arguments):
        parser.error("give --url, or what to serve after --")
    with contextlib.nullcontext(url) if url else serving(arguments) as address:
        take_screenshot(address, chosen.pop("output"), chosen.pop("query"), **chosen)


if __name__ == "__main__":
    main()
