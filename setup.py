"""What pyproject.toml cannot say: what a wheel carries that a checkout has beside the package, and its description.

The trainer, the configs, the app and the browser's page go into the wheel as nanogpt_hub/train/, nanogpt_hub/configs/,
nanogpt_hub/app.py and nanogpt_hub/web/: in site-packages, names such as train and app would belong to everybody. An
editable install finds them in the checkout.
"""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PARTS = ("train", "configs", "web", "app.py", "requirements.txt")  # as nanogpt_hub/system/installed.py looks for them


class BuildWithParts(build_py):
    """Builds the package, then copies the parts into it."""

    def run(self):
        super().run()
        for name in () if self.editable_mode else PARTS:
            source, target = ROOT / name, Path(self.build_lib, "nanogpt_hub", name)
            if source.is_dir():
                shutil.rmtree(target, ignore_errors=True)  # of an earlier build
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, target)


def description() -> str:
    """README.md without its head, which is for the Hub: the settings of a Space."""
    return re.sub(r"\A---\n.*?\n---\n+", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


setup(
    cmdclass={"build_py": BuildWithParts},
    long_description=description(),
    long_description_content_type="text/markdown",
)
