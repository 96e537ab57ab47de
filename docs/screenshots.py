"""The pictures of the page in docs/, made anew: `python docs/screenshots.py [--model out/quickstart/best --runs out]`.

Needs playwright and Chromium (`make browser`). The page is opened as a visitor opens it, wide and narrow,
in light and dark; `app-tour.gif` shows a token from inside and a training run that plays. --chat names a model that was
tuned on conversations; without one there is no picture of the tab Chat.
"""

import argparse
import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

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
TALL = {"width": 1280, "height": 1180}  # the whole panel beside the text
GIF_SIZE, GIF_COLORS, FRAME_MS = (760, 760 * 1180 // 1280), 96, 260  # so that the file stays under 2 MB
POINTER = """addEventListener("DOMContentLoaded", () => {
  const dot = document.createElement("div");
  dot.style.cssText = "position: fixed; z-index: 999; width: 18px; height: 18px; margin: -9px; border-radius: 50%; " +
    "background: rgba(205, 72, 20, 0.55); border: 2px solid #fff; pointer-events: none; left: -50px; top: 0;";
  document.body.append(dot);
  const follow = ({ clientX: x, clientY: y }) => Object.assign(dot.style, { left: x + "px", top: y + "px" });
  addEventListener("mousemove", follow);
});"""  # the mouse, which pictures of a page do not show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="", help="a folder, or user/name on the Hub (default: the built-in tiny one)"
    )
    parser.add_argument("--runs", default=None, help="folder of training runs")
    parser.add_argument("--chat", default="", help="a model that was tuned on conversations (default: none)")
    parser.add_argument("--only", choices=("still", "moving"), help="the pictures or the film alone")
    parser.add_argument("--out", type=Path, default=DOCS, help="where the pictures go (default: docs/)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    blocks = create_page(Playground(ModelStore(args.model or "tiny", args.runs, any_folder=True)))
    _, url, _ = serve(blocks, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        if args.only != "moving":
            wide(browser, url, args.out)
            narrow(browser, url, args.out)
            if args.chat:
                talk(browser, f"{url}?repo={quote(args.chat)}", args.out)
        if args.only != "still":
            moving(browser, url, args.out)
        browser.close()
    blocks.close()


def visit(browser: Browser, url: str, size: dict, scheme: str, pointer: bool = False) -> Page:
    """The page as it is after the example was shown, without the offer of the tour. pointer: with the mouse drawn."""
    page = browser.new_page(viewport=size, color_scheme=scheme)
    page.set_default_timeout(60_000)
    page.add_init_script("localStorage.setItem('nanogpt-hub-tour', 'seen')")
    if pointer:
        page.add_init_script(POINTER)
    page.goto(url)
    page.locator("#panel .choice").first.wait_for()
    page.wait_for_timeout(1500)
    return page


def wide(browser: Browser, url: str, out: Path) -> None:
    page = visit(browser, url, WIDE, "light")
    page.screenshot(path=out / "app-generate.png")
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
        if name == "Training" and page.locator("#growth .att").count():
            page.locator("#growth").screenshot(path=out / "app-head.png")
    page.close()


def talk(browser: Browser, url: str, out: Path) -> None:
    """A conversation of the question that the run asked itself and one more, in dark."""
    page = visit(browser, url, WIDE, "dark")
    page.get_by_role("tab", name="Chat", exact=True).click()
    message = page.locator("#message textarea")
    asked = message.input_value() or "Hello!"
    for text in (asked, "How many?"):
        message.fill(text)
        message.press("Enter")
        page.locator("#chat-log .said.user", has_text=text).wait_for()
        page.wait_for_function("!document.querySelector('#chat-log .writing')")
    page.locator("#chat-tokens .token:not(.prompt)").first.click()
    page.locator("#chat-panel .choice").first.wait_for()
    page.wait_for_timeout(1000)
    page.screenshot(path=out / "app-chat.png")
    page.close()


def narrow(browser: Browser, url: str, out: Path) -> None:
    page = visit(browser, url, NARROW, "dark")
    page.screenshot(path=out / "app-narrow.png")
    page.close()


class Film:
    """Frames of a page, with the pointer where the mouse is."""

    def __init__(self, page: Page):
        self.page, self.frames = page, []

    def shoot(self, times: int = 1, act: Callable[[], object] | None = None) -> None:
        """Frames after an act, each a moment later."""
        if act:
            act()
        for _ in range(times):
            picture = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
            self.frames.append(picture.resize(GIF_SIZE, Image.Resampling.LANCZOS))
            self.page.wait_for_timeout(100)

    def point(self, selector: str, n: int = 0, times: int = 2, click: bool = False) -> None:
        """Moves the mouse to an element, and clicks it."""
        place = self.page.locator(selector).nth(n)
        self.shoot(1, place.hover)
        self.shoot(times, place.click if click else None)

    def play(self, button: str, most: int = 24) -> None:
        """Frames while a run plays, half a second apart."""
        self.point(button, times=1, click=True)
        while most and "Pause" in (self.page.locator(button).text_content() or ""):
            self.page.wait_for_timeout(250)
            self.shoot()
            most -= 1
        self.shoot(3)

    def save(self, path: Path) -> None:
        """As a GIF in one palette, so that what does not change costs nothing."""
        some = self.frames[:: max(1, len(self.frames) // 12)]
        sheet = Image.new("RGB", (GIF_SIZE[0], GIF_SIZE[1] * len(some)))
        for n, frame in enumerate(some):
            sheet.paste(frame, (0, n * GIF_SIZE[1]))
        palette = sheet.quantize(GIF_COLORS)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in self.frames]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0, optimize=True)


def moving(browser: Browser, url: str, out: Path) -> None:
    """Some twenty seconds: a token is chosen, the temperature moves, heads light up, a branch grows, a run plays."""
    page = visit(browser, url, TALL, "light", pointer=True)
    film = Film(page)
    film.shoot(3)
    film.point("#output .token:not(.prompt)", 18, times=4, click=True)
    for value in ("0.2", "0.5", "1.1", "1.6", "0.8"):
        film.shoot(1, lambda value=value: set_number(page, "#temperature", value))
    for n in (1, 4, 6, 9, 14):
        if n < page.locator("#panel .att").count():
            film.point("#panel .att", n, times=1)
    film.point("#panel .choice:not(:has(.chosen))", 1, times=1, click=True)
    page.locator(".branch").nth(1).wait_for()
    film.shoot(6)
    film.point('[role="tab"]:has-text("Training")', click=True)
    page.locator("#training .play").wait_for()
    film.play("#training .play")
    if page.locator("#growth .play").count():
        page.locator("#growth .enlarged").scroll_into_view_if_needed()
        film.play("#growth .play")
    film.save(out / "app-tour.gif")
    page.close()


def set_number(page: Page, slider: str, value: str) -> None:
    field = page.locator(f"{slider} input[type=number]")
    field.fill(value)
    field.press("Tab")


if __name__ == "__main__":
    main()
