"""What pyproject.toml cannot say: the browser page, web/, goes into the wheel as nanogpt_hub/web/."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPage(build_py):
    """Builds the package, then copies the page into it. An editable install finds web/ in the checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(
                Path(__file__).parent / "web", Path(self.build_lib, "nanogpt_hub", "web"), dirs_exist_ok=True
            )


setup(cmdclass={"build_py": BuildWithPage})
