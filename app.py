"""The app: loads any GPT of this project by name or folder, generates with it, and shows what happens inside.

    python app.py                              # the newest model of your runs (out/), else a tiny one made on the spot
    python app.py --model out/quickstart/best  # a folder
    python app.py --model user/name@step-000500

(`nanogpt-hub app` is the same, outside of a checkout too.) As a Space it needs nothing but this file, nanogpt_hub/ and
requirements.txt; the variable NANOGPT_REPO names its model.
The page is in nanogpt_hub/page/, what it does in nanogpt_hub/playground/.
"""

import argparse
import importlib.util
import os
import threading
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is: threads that spin for long starve each other

try:
    import torch

    from nanogpt_hub.engine import ENGINES
    from nanogpt_hub.engine.select import VARIABLE, engine_setting, open_engine
    from nanogpt_hub.hub.resolve import Resolved
    from nanogpt_hub.page.layout import create_page, serve
    from nanogpt_hub.playground.models import ModelStore
    from nanogpt_hub.playground.session import Playground
    from nanogpt_hub.sampling import SamplingConfig
    from nanogpt_hub.system.devices import choose_device
    from nanogpt_hub.system.installed import pip_line
except ModuleNotFoundError:
    from nanogpt_hub.system.installed import need

    need("the app", "app")
    raise


def parse(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description="A page that loads any GPT of this project and shows what it does."
    )
    parser.add_argument("--model", default="", help="a folder, or user/name[@revision] on the Hub")
    parser.add_argument("--runs", default="out", help="folder of your training runs (default: out)")
    parser.add_argument(
        "--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="0.0.0.0 for the whole network"
    )
    parser.add_argument("--port", type=int, default=None, help="default: the first free one from 7860")
    parser.add_argument("--engine", choices=ENGINES, help="what generates (default: auto, the fastest that is ready)")
    parser.add_argument("--mcp", action="store_true", help="also serve the API to agents (needs gradio[mcp])")
    args = parser.parse_args(argv)
    args.mcp = args.mcp or os.environ.get("NANOGPT_MCP", "") not in ("", "0")
    if args.mcp and importlib.util.find_spec("mcp") is None:
        parser.error(f"--mcp needs a package that is not installed: {pip_line(['gradio[mcp]'])}")
    return args


def make_playground(args: argparse.Namespace) -> Playground:
    """The playground that arguments and variables ask for."""
    on_space = bool(os.environ.get("SPACE_ID"))
    name, revision = os.environ.get("NANOGPT_REPO", ""), os.environ.get("NANOGPT_REVISION", "")
    models = ModelStore(
        args.model or (f"{name}@{revision}" if name and revision else name),
        args.runs if Path(args.runs).is_dir() else None,
        allowed=[pattern.strip() for pattern in os.environ.get("NANOGPT_ALLOWED", "*").split(",")],
        any_folder=not on_space and args.host in ("127.0.0.1", "localhost", "::1"),
        on_space=on_space,
        device=best_device(),
    )
    return Playground(models, zero_gpu())


def best_device() -> str:
    """Where models run in this process. On ZeroGPU it has no GPU of its own."""
    return "cpu" if os.environ.get("SPACES_ZERO_GPU") else choose_device()


def zero_gpu() -> Callable | None:
    """On a ZeroGPU Space, the decorator that runs a generator in a process that has a GPU; elsewhere None."""
    if not os.environ.get("SPACES_ZERO_GPU") or importlib.util.find_spec("spaces") is None:
        return None
    import spaces

    def seconds(place: Resolved, ids: list[int], config: SamplingConfig) -> int:
        return min(60, 10 + config.max_new_tokens // 20)

    return spaces.GPU(duration=seconds)


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    args = parse(argv, prog)
    if args.engine:
        os.environ[VARIABLE] = args.engine
    playground = make_playground(args)
    if hasattr(os, "register_at_fork"):  # a GPU is lent to a fork of this process, whose locks may be held for ever
        os.register_at_fork(after_in_child=playground.models.cache.clear)
    if playground.models.device == "cpu":
        torch.set_num_threads(max(1, min(4, torch.get_num_threads())))  # small models gain nothing from more
        if engine_setting() in ("auto", "numba"):
            open_engine("auto")  # has it prepared in the background; until it is ready PyTorch generates
    threading.Thread(target=warm_up, args=(playground,), daemon=True).start()
    blocks = create_page(playground, workers=int(os.environ.get("NANOGPT_WORKERS", "1")))
    serve(blocks, server_name=args.host, server_port=args.port, mcp_server=args.mcp)


def warm_up(playground: Playground) -> None:
    """Loads the first model while the page is built; what goes wrong is told to the first visitor."""
    try:
        playground.example(playground.models.find())
    except (ValueError, OSError):
        return


if __name__ == "__main__":
    main()
