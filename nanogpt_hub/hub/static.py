"""A static Space in one command: a page in which the visitor's own browser runs the model. It needs no server.

    space = create_static_space("user/demo", "user/name")
    page_files("user/name")            # what is published: path -> bytes

The page is the folder `web/`: beside the package in a checkout, inside it in an installed wheel. Nothing is built. Two
files depend on the model and the Hub: site.json, and the content policy in index.html.
"""

import json
import logging
import re
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError

from nanogpt_hub.hub.card import TAG
from nanogpt_hub.hub.publish import Push, Say, create_repo, send_patiently
from nanogpt_hub.hub.readme import update_readme
from nanogpt_hub.hub.resolve import HubError, explain, limit_waiting, split_name
from nanogpt_hub.hub.space import Space, own_space
from nanogpt_hub.system.installed import part

logger = logging.getLogger(__name__)

PAGE_FILES = re.compile(r"README\.md|(kernels/)?[\w-]+\.(html|css|js|json)")
HUB_SOURCES = "https://huggingface.co https://*.huggingface.co https://*.hf.co"  # where its files come from
CONNECT = re.compile(r"connect-src 'self'[^;\"]*")


def page_files(model: str = "", revision: str = "", endpoint: str = "") -> dict[str, bytes]:
    """All files of the page by their path. `model` is user/name, a folder beside it (./model/), or "" for none.

    Raises FileNotFoundError for an installation that lacks the page.
    """
    endpoint = endpoint or constants.ENDPOINT
    folder = part("web")
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path.read_bytes() for name, path in paths.items() if PAGE_FILES.fullmatch(name)}
    site = {"model": model, "revision": revision, "endpoint": endpoint}
    files["site.json"] = (json.dumps(site, indent=2) + "\n").encode()
    files["index.html"] = with_policy(files["index.html"].decode(), endpoint).encode()
    return files


def with_policy(html: str, endpoint: str) -> str:
    """index.html that may ask this Hub, and no other machine."""
    return CONNECT.sub(f"connect-src 'self' {hub_sources(endpoint)}", html)


def hub_sources(endpoint: str) -> str:
    """The machines of a Hub, for a content policy."""
    parts = urlsplit(endpoint)
    if parts.hostname == "huggingface.co":
        return HUB_SOURCES
    if parts.hostname in ("localhost", "127.0.0.1"):  # a Hub on this machine may send on to its other name
        return f"http://localhost:{parts.port} http://127.0.0.1:{parts.port}"
    return f"{parts.scheme}://{parts.netloc}"


def create_static_space(
    space_id: str, model: str, *, private: bool = False, token: str | None = None, say: Say = logger.info
) -> Space:
    """Creates or updates a static Space that opens with `model`, "user/name" or "user/name@revision" on the Hub.

    Visitors need no account; for a private model each gives a token of their own. Raises HubError, one sentence.
    """
    limit_waiting()
    api = HfApi(token=token)
    model_id, revision = split_name(model)
    try:
        space_id = own_space(api, space_id)
        url = create_repo(api, space_id, private=private, kind="space", space_sdk="static")
        files = {**page_files(model_id, revision), "README.md": page_readme(model_id).encode()}
        push = Push(space_id, files, f"Page for {model_id}", kind="space", owned=PAGE_FILES)
        sha = send_patiently(push, api, say, backoff=1.0)
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(explain(error, model_id, revision, doing=f"make the Space {space_id}")) from error
    return Space(space_id, url, sha, model_id)


def page_readme(model_id: str) -> str:
    """The Space's README.md: the settings that the Hub reads, and a few words for people."""
    name = model_id.rpartition("/")[2]
    data = {
        "title": f"{name} in your browser",
        "emoji": "🔎",
        "colorFrom": "green",
        "colorTo": "yellow",
        "sdk": "static",
        "app_file": "index.html",
        "short_description": "A small GPT that runs in your browser",
        "models": [model_id],
        "tags": [TAG, "text-generation", "education"],
    }
    block = (
        f"# {name} in your browser\n\n[{model_id}](https://huggingface.co/{model_id}) runs in this page, on the "
        "visitor's own processor: write with it, choose a token, and see what else could have come, where the model "
        "looked and how its answer grew from layer to layer.\n\n"
        "To have a page like this for a model of yours: `nanogpt-hub space you/demo --static --model you/model`, or "
        "duplicate this Space and write the model's name into `site.json`."
    )
    return update_readme("", data, block)
