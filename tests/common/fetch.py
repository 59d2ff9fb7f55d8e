"""
Fetch the common model tests of the installed transformers, which come with its source distribution only.

    python tests/common/fetch.py

They go into `build/common-tests/VERSION`, as a package beside what they need; nothing of them is part of this project.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


PLACE = Path(__file__).parents[2] / "build" / "common-tests" / version("transformers")
PACKAGE = "transformers_tests"
FILES = ("test_modeling_common.py", "test_configuration_common.py")
# what these import of folders that the distribution leaves out: tests of models that generate, or export themselves
STAND_INS = {
    "__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def fetch() -> Path:
    """Fetch them unless they are there: the folder that goes on the path."""
    package = PLACE / PACKAGE
    if not package.exists():
        pip("install", "--no-deps", "--target", str(PLACE), "parameterized")
        with tempfile.TemporaryDirectory(dir=PLACE) as folder:
            wanted = f"transformers=={version('transformers')}"
            pip("download", "--no-deps", "--no-binary", ":all:", "--dest", folder, wanted)
            (archive,) = Path(folder).glob("*.tar.gz")
            made = Path(folder) / PACKAGE
            with tarfile.open(archive) as files:
                for name in FILES:
                    stored = files.extractfile(f"{archive.name.removesuffix('.tar.gz')}/tests/{name}")
                    assert stored is not None
                    made.mkdir(exist_ok=True)
                    (made / name).write_bytes(stored.read())
            for name, text in STAND_INS.items():
                (made / name).parent.mkdir(exist_ok=True)
                (made / name).write_text(text)
            made.rename(package)
    return PLACE


if __name__ == "__main__":
    print(fetch())
