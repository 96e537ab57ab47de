"""The pictures of the page in docs/, made anew: `python docs/screenshots.py [--model out/quickstart/best --runs out]`.

Needs playwright and Chromium (`make browser`). The page is opened as a visitor opens it, wide and narrow,
in light and dark; `app-tour.gif` shows a token from inside and a training run that plays.
"""

import argparse
import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
sys.path.insert(0, str(Path(__file__).parents[1]))

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from nanogpt_hub.page.layout import create_page, serve
from nanogpt_hub.playground.models import ModelStore
from nanogpt_hub.playground.session import Playground

DOCS = Path(__file__).parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
GIF_WIDTH, GIF_COLORS = 800, 64  # so that the file stays under 2 MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="", help="a folder, or user/name on the Hub (default: the built-in tiny one)"
    )
    parser.add_argument("--runs", default=None, help="folder of training runs")
    parser.add_argument("--out", type=Path, default=DOCS, help="where the pictures go (default: docs/)")
    args = parser.parse_args()
    blocks = create_page(Playground(ModelStore(args.model or "tiny", args.runs, any_folder=True)))
    _, url, _ = serve(blocks, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        wide(browser, url, args.out)
        narrow(browser, url, args.out)
        moving(browser, url, args.out)
        browser.close()
    blocks.close()


def visit(browser: Browser, url: str, size: dict, scheme: str) -> Page:
    """The page as it is after the example was shown, without the offer of the tour."""
    page = browser.new_page(viewport=size, color_scheme=scheme)
    page.set_default_timeout(180_000)
    page.add_init_script("localStorage.setItem('nanogpt-hub-tour', 'seen')")
    page.goto(url)
    page.locator("#panel .choice").first.wait_for()
    page.wait_for_timeout(1500)
    return page


def wide(browser: Browser, url: str, out: Path) -> None:
    page = visit(browser, url, WIDE, "light")
    page.screenshot(path=out / "app-generate.png")
    page.locator("#panel .att").nth(1).hover()
    page.wait_for_timeout(400)
    page.screenshot(path=out / "app-attention.png")
    for name, ready, file in (
        ("Look inside", "#look-panel .choice", "app-lens.png"),
        ("Training", "#training .play", "app-training.png"),
        ("Compare", "#compare", "app-compare.png"),
    ):
        page.get_by_role("tab", name=name, exact=True).click()
        page.locator(ready).first.wait_for()
        if name == "Compare":
            page.locator("#compare").click()
            page.locator("#reread .token").first.wait_for()
        page.wait_for_timeout(1000)
        page.screenshot(path=out / file)
    page.close()


def narrow(browser: Browser, url: str, out: Path) -> None:
    page = visit(browser, url, NARROW, "dark")
    page.screenshot(path=out / "app-narrow.png")
    page.close()


def moving(browser: Browser, url: str, out: Path) -> None:
    """Some twenty seconds: the temperature moves, heads light up, a branch grows, a run plays."""
    page, frames = visit(browser, url, WIDE, "light"), []

    def shoot(times: int = 1, act: Callable[[], object] | None = None) -> None:
        if act:
            act()
        for _ in range(times):
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            frames.append(picture.resize((GIF_WIDTH, GIF_WIDTH * 900 // 1280)).quantize(GIF_COLORS))
            page.wait_for_timeout(120)

    shoot(3)
    for value in ("0.2", "0.6", "1.0", "1.5", "0.8"):
        shoot(2, lambda value=value: set_number(page, "#temperature", value))
    for n in range(min(6, page.locator("#panel .att").count())):
        shoot(2, page.locator("#panel .att").nth(n).hover)
    page.locator("#panel .choice").nth(1).click()
    page.locator(".branch").nth(1).wait_for()
    shoot(6)
    page.get_by_role("tab", name="Training", exact=True).click()
    page.locator("#training .play").wait_for()
    shoot(2)
    page.locator("#training .play").click()
    shoot(24)
    frames[0].save(out / "app-tour.gif", save_all=True, append_images=frames[1:], duration=300, loop=0, optimize=True)
    page.close()


def set_number(page: Page, slider: str, value: str) -> None:
    field = page.locator(f"{slider} input[type=number]")
    field.fill(value)
    field.press("Tab")


if __name__ == "__main__":
    main()
