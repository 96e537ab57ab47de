"""What README shows is what the commands print, and every file that it names is there."""

import re
from pathlib import Path

from nanogpt_hub.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_sizes_table_is_what_the_command_prints(capsys):
    main(["sizes"])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    losses = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- sizes: begin -->\n(.*?)\n<!-- sizes: end -->", losses, re.DOTALL)[1].splitlines()
    assert shown == printed


def test_every_file_that_is_linked_or_shown_is_there():
    named = re.findall(r"\]\((?!https?:)([^)#]+)\)|(configs/\w+\.yaml)", README)
    paths = {path for pair in named for path in pair if path}
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_front_matter_makes_a_space_of_the_checkout():
    import yaml

    head = yaml.safe_load(README.split("---")[1])
    assert head["sdk"] == "gradio"
    assert (ROOT / head["app_file"]).is_file()
    pinned = re.search(r"^gradio==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert head["sdk_version"] == pinned
