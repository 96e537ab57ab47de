"""A Space in one command: the app, the library and a README, with a model of yours as the default.

    space = create_space("user/demo", "user/name")
    print(space.url, space.how_to_duplicate)

Run again it updates the Space by one commit; files and words that people added there stay.
"""

import importlib.metadata
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi, SpaceHardware, hf_hub_download
from huggingface_hub.errors import HTTPError

from nanogpt_hub.checkpoint import core_difference, read_json
from nanogpt_hub.edits.core import core_of_text
from nanogpt_hub.edits.fingerprint import verified_table
from nanogpt_hub.hub.card import TAG
from nanogpt_hub.hub.publish import Push, Say, check_account, create_repo, send_patiently
from nanogpt_hub.hub.readme import update_readme
from nanogpt_hub.hub.resolve import HubError, explain, limit_waiting, split_name
from nanogpt_hub.system.installed import PACKAGE, PARTS, part

logger = logging.getLogger(__name__)

APP_FILES = re.compile(r"app\.py|requirements\.txt|README\.md|nanogpt_hub/([\w-]+/)*[\w-]+\.(py|css|js|html|json)")
# What only training needs; gradio comes by sdk_version.
NOT_IN_A_SPACE = re.compile(r"(gradio|accelerate|datasets|pyarrow|filelock|jsonargparse|matplotlib|detect-secrets)\b")
FREE_HARDWARE = "zero-a10g"  # ZeroGPU: what an account without a subscription may use
PYTHON = "3.12.12"  # of the two versions that ZeroGPU has


@dataclass(frozen=True)
class Space:
    """A Space that was created or updated."""

    space_id: str
    url: str
    sha: str
    model_id: str

    @property
    def how_to_duplicate(self) -> str:
        return (
            f"to have another one by hand: open {self.url}, choose Duplicate this Space in its menu, "
            f"and set the variable NANOGPT_REPO to a model's name (here it is {self.model_id})"
        )


def create_space(
    space_id: str,
    model: str,
    *,
    private: bool = False,
    hardware: str | None = None,
    app_folder: str | Path | None = None,
    secrets: Mapping[str, str] | None = None,
    token: str | None = None,
    say: Say = logger.info,
) -> Space:
    """Creates or updates a Gradio Space that opens with `model`, "user/name" or "user/name@revision" on the Hub.

    hardware: None takes ZeroGPU for a new Space and leaves that of an existing one. app_folder: where app.py,
    requirements.txt and nanogpt_hub/ are; None means those of this installation. secrets: set in the Space's settings;
    none is set unless given (a private model needs HF_TOKEN there, or visitors who sign in). Raises HubError, one
    sentence.
    """
    limit_waiting()
    api = HfApi(token=token)
    model_id, revision = split_name(model)
    try:
        space_id = own_space(api, space_id)
        info = api.model_info(model_id, revision=revision)
        files = collect_space(app_folder, model_id, preload="" if info.private else info.sha or "")
        config = hf_hub_download(model_id, "config.json", revision=info.sha, token=token)
        check_cores(read_json(config), files, model_id)
        about = dict(space_sdk="gradio", space_hardware=hardware or FREE_HARDWARE)
        url = create_repo(api, space_id, private=private, kind="space", **about)
        push = Push(space_id, files, f"Playground for {model_id}", kind="space", owned=APP_FILES)
        sha = send_patiently(push, api, say, backoff=1.0)
        configure(api, space_id, {"NANOGPT_REPO": model_id, "NANOGPT_REVISION": revision}, secrets or {}, hardware)
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(explain(error, model_id, revision, doing=f"make the Space {space_id}")) from error
    return Space(space_id, url, sha, model_id)


def own_space(api: HfApi, space_id: str) -> str:
    """The whole name of a Space that this account may write; a name alone is one of its own. Raises HubError."""
    space_id, _ = split_name(space_id)
    account = api.whoami()
    space_id = space_id if "/" in space_id else f"{account['name']}/{space_id}"
    check_account(account, space_id)
    return space_id


def check_cores(config: Mapping[str, Any], files: Mapping[str, bytes], model_id: str) -> None:
    """Raises HubError where the Space's model.py is not the one that the model's weights belong to."""
    source, table = (files.get(f"nanogpt_hub/{name}.py", b"").decode() for name in ("model", "edits/fingerprint"))
    verified = verified_table(table)
    if verified is None:  # an app from before there was one
        return
    if difference := core_difference(config, core_of_text(source, verified)):
        raise HubError(
            f"the Space could not load {model_id}: {difference}: run this in a checkout that has the right "
            "nanogpt_hub/model.py, or name one as app folder"
        )


def configure(
    api: HfApi, space_id: str, variables: Mapping[str, str], secrets: Mapping[str, str], hardware: str | None
) -> None:
    """Sets what belongs to a Space's settings and not to its files; hardware only if it is asked for."""
    for name, value in variables.items():
        api.add_space_variable(space_id, name, value)
    for name, value in secrets.items():
        api.add_space_secret(space_id, name, value)
    if hardware:
        api.request_space_hardware(space_id, cast(SpaceHardware, hardware))  # the client takes the name, too


def collect_space(app_folder: str | Path | None, model_id: str, preload: str = "") -> dict[str, bytes]:
    """All files of the Space by their path in it. `preload`: the commit of a public model to bake into its image.

    Raises HubError where the folder has no app.
    """
    app, requirements, package = app_parts(app_folder)
    paths = {f"nanogpt_hub/{path.relative_to(package).as_posix()}": path for path in sorted(package.rglob("*"))}
    paths = {name: path for name, path in paths.items() if path.relative_to(package).parts[0] not in PARTS}
    found = {"app.py": app, **paths}
    files = {name: path.read_bytes() for name, path in found.items() if path.is_file() and APP_FILES.fullmatch(name)}
    files["requirements.txt"] = space_requirements(requirements.read_text(encoding="utf-8")).encode()
    files["README.md"] = space_readme(model_id, preload).encode()
    return files


def app_parts(app_folder: str | Path | None) -> tuple[Path, Path, Path]:
    """app.py, requirements.txt and the package: of this installation, or of another folder. Raises HubError."""
    if app_folder is None:
        return part("app.py"), part("requirements.txt"), PACKAGE
    folder = Path(app_folder)
    if not (folder / "app.py").is_file():
        raise HubError(f"{folder} has no app.py: name a checkout of nanogpt_hub as app folder, or leave it out")
    return folder / "app.py", folder / "requirements.txt", folder / "nanogpt_hub"


def space_requirements(text: str) -> str:
    """The requirements without what only training needs, and without gradio, which the Space brings."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return "".join(f"{line}\n" for line in lines if line and not NOT_IN_A_SPACE.match(line))


def space_readme(model_id: str, preload: str = "") -> str:
    """The Space's README.md: the settings that the Hub reads, and a few words for people."""
    name = model_id.rpartition("/")[2]
    data = {
        "title": f"{name} playground",
        "emoji": "📖",
        "colorFrom": "indigo",
        "colorTo": "yellow",
        "sdk": "gradio",
        "sdk_version": importlib.metadata.version("gradio"),
        "python_version": PYTHON,
        "app_file": "app.py",
        "short_description": "Sample from and look inside small GPTs",
        "suggested_hardware": FREE_HARDWARE,
        "models": [model_id],
        "tags": [TAG, "text-generation", "education"],
        "hf_oauth": True,  # so that visitors can open private models of their own
        "hf_oauth_scopes": ["read-repos"],
    }
    if preload:
        data["preload_from_hub"] = [f"{model_id} config.json,model.safetensors,tokenizer.json {preload}"]
    block = (
        f"# {name} playground\n\nSample from [{model_id}](https://huggingface.co/{model_id}) and look inside it, or "
        "open any other model that was made with `nanogpt_hub` by its name.\n\n"
        "To have a Space like this for a model of yours: `nanogpt-hub space you/demo --model you/model`, or choose "
        "*Duplicate this Space* in the menu above and set the variable `NANOGPT_REPO` to the model's name."
    )
    return update_readme("", data, block)
