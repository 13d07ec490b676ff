"""What pyproject.toml cannot say: a wheel also holds train.py, infer.py and configs/.

They stand at the root of the repository, where they are read; in a wheel they lie in the package,
where `python -m dsv3_jax train` and `--config tiny` find them.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
INSIDE = {"scripts": [ROOT / "train.py", ROOT / "infer.py"]}
for folder in ("configs", "configs/scale"):
    INSIDE[folder] = sorted((ROOT / folder).glob("*.py"))


class BuildWithScripts(build_py):
    """Also copies the scripts and the configs, but for an editable install."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name, files in INSIDE.items():
            folder = Path(self.build_lib, "dsv3_jax", name)
            self.mkpath(str(folder))
            for file in files:
                self.copy_file(str(file), str(folder / file.name))


setup(cmdclass={"build_py": BuildWithScripts})
