"""What mkdocs is told beyond mkdocs.yml: the pages that lie outside of docs/, and where a link leads on the site.

    make site                                                # build/site/index.html; a broken link is an error

Links are written for GitHub, from file to file. Here they become links between pages: README.md is the start (up to
its list of pages), lessons/ the course, and a Python file its page in the reference, which is made of docstrings. A
link to anything else, such as a config, leads to the repository (REPO_URL), or is plain text.
"""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGES = ("nanogpt_hub", "train")
PICTURES = (".png", ".gif", ".svg")
LINK = re.compile(r"(?P<text>(?P<picture>!?)\[(?P<words>(?:!\[[^\]]*\]\([^)]*\)|[^\]])*)\])\((?P<target>[^)\s]+)\)")
CODE = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)
log = logging.getLogger("mkdocs.site")  # below mkdocs: what it warns of ends a strict build


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds to the menu what it does not name: further pages of docs/, the course and the reference."""
    nav = [*(config.nav or [])]
    named = {path for entry in nav for path in entry.values()}
    more = [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in named]
    lessons = [*sorted(ROOT.glob("lessons/*/*.md")), *sorted(ROOT.glob("lessons/*.md"))]
    course = [site_path(path) for path in lessons if path != ROOT / "lessons" / "README.md"]
    modules = [site_path(path) for path in modules_of_reference()]
    config.nav = [*nav, *more, {"The course": ["lessons/index.md", *course]}, {"Reference": modules}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside of docs/."""
    outside = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("lessons/**/*.md")]
    for path in outside:
        files.append(File.generated(config, site_path(path), content=text_of(path)))
    for path in (path for path in ROOT.glob("lessons/**/*") if path.suffix in PICTURES):
        files.append(File.generated(config, site_path(path), abs_src_path=str(path)))
    for path in modules_of_reference():
        name = module_name(path)
        files.append(File.generated(config, site_path(path), content=f"# {name}\n\n::: {name}\n"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links from file to file into links from page to page."""
    parts = CODE.split(markdown)
    source = source_of(page.file.src_uri)
    if source is not None:
        parts[::2] = [LINK.sub(lambda found: linked(found, source, page, config), part) for part in parts[::2]]
    return "".join(parts)


# ---- pages ----


def modules_of_reference() -> list[Path]:
    """The modules that have a page: those with a docstring, packages by their __init__.py."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [path for path in paths if path.name != "__main__.py" and path.read_text(encoding="utf-8").startswith('"""')]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def site_path(path: Path) -> str:
    """Where a file of the repository is on the site, whether there is such a page or not."""
    name = path.relative_to(ROOT).as_posix()
    if name == "CONTRIBUTING.md":
        return "contributing.md"
    if path.suffix == ".py" and name.split("/")[0] in PACKAGES:
        return f"reference/{module_name(path)}.md"
    return re.sub(r"(^|/)README\.md$", r"\1index.md", name.removeprefix("docs/"))


def source_of(page: str) -> Path | None:
    """The file of the repository that a page is made of; None for one of the reference."""
    named = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
    if page.startswith("reference/"):
        return None
    if page.startswith("lessons/"):
        return ROOT / re.sub(r"index\.md$", "README.md", page)
    return ROOT / named.get(page, f"docs/{page}")


def text_of(path: Path) -> str:
    """A page's text; of README.md without its head, which is for the Hub, and without its list of pages."""
    text = path.read_text(encoding="utf-8")
    if path == ROOT / "README.md":
        text = re.sub(r"\A---\n.*?\n---\n+", "", text, flags=re.DOTALL).rpartition("\n## ")[0]
    return text


# ---- links ----


def linked(found: re.Match, source: Path, page: Page, config: MkDocsConfig) -> str:
    """A link of `source`, as `page` needs it."""
    target, mark, anchor = found["target"].partition("#")
    words = LINK.sub(lambda inner: linked(inner, source, page, config), found["words"])
    if not target or re.match(r"[a-z]+:", target):
        return found[0]
    path = Path(posixpath.normpath(posixpath.join(source.parent.as_posix(), target)))
    if not path.exists() or not path.is_relative_to(ROOT):
        log.warning("%s links to %s, which is not in the repository", source.relative_to(ROOT), target)
        return found[0]
    goal = path / "__init__.py" if (path / "__init__.py").is_file() else path
    goal = goal / "README.md" if (goal / "README.md").is_file() else goal
    if is_page(goal):
        there = posixpath.relpath(site_path(goal), posixpath.dirname(page.file.src_uri) or ".")
        return f"{found['picture']}[{words}]({there}{mark}{anchor})"
    kind = "tree" if path.is_dir() else "blob"
    name = path.relative_to(ROOT).as_posix()
    return f"[{words}]({config.repo_url}/{kind}/main/{name})" if config.repo_url else words


def is_page(path: Path) -> bool:
    """Whether a file of the repository is on the site."""
    if path.suffix == ".py":
        return path in modules_of_reference()
    in_docs = path.parent == ROOT / "docs" or ROOT / "lessons" in path.parents
    return (in_docs and path.suffix in (".md", *PICTURES)) or path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md")
