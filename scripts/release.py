"""A release's files, tried as a stranger would: `python scripts/release.py FOLDER`, with FOLDER/dist as built.

The metadata are checked, the changelog has a heading for the version, and the wheel is installed into a clean
environment outside of this tree, where a part of the tests runs against it: with its own dependencies and the tests'.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("test_forward.py", "test_streaming.py", "test_errors.py")
SELECT = "not torch and not jax and (Linear or CosFormer or Softmax)"
HELPERS = ("cases.py", "conftest.py", "loglinear_cases.py")
NUMERICS = "### Numerics"


def notes(changelog: str, version: str) -> str:
    """What the changelog says of a version; its release notes. Raises ValueError if that is incomplete."""
    plain = re.match(r"\d+(?:\.\d+)*", version)
    if plain is None:
        raise ValueError(f"The version must begin with numbers, got {version!r}.")
    parts = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]
    mine = [part for part in parts if part.split()[0] == plain[0]]
    if len(mine) != 1:
        raise ValueError(f"CHANGELOG.md must have one heading for {plain[0]}, got {len(mine)}.")
    if NUMERICS not in mine[0]:
        raise ValueError(f"CHANGELOG.md must have a heading Numerics for {plain[0]}.")
    return mine[0]


def files(dist: Path, version: str) -> tuple[Path, Path]:
    """The wheel and the sdist of this version, and nothing else."""
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    for file in (wheel, sdist):
        if file.name.removesuffix(".tar.gz").split("-")[1] != version:
            raise ValueError(f"{file.name} must be of version {version}.")
    return wheel, sdist


def main(folder: Path) -> int:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    print(f"## {notes((ROOT / 'CHANGELOG.md').read_text(encoding='utf-8'), version)}")
    wheel, sdist = files(folder / "dist", version)
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", wheel, sdist], check=True)
    venv.create(folder / "clean", with_pip=True)
    python = folder / "clean" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"{wheel}[test]"], check=True)
    apart = folder / "apart" / "tests"
    apart.mkdir(parents=True)
    for name in (*TESTS, *HELPERS):
        shutil.copy(ROOT / "tests" / name, apart)
    shutil.copy(ROOT / "pyproject.toml", apart.parent)  # pytest's settings
    said = subprocess.run([python, "-c", "import linattn; print(linattn.__file__, linattn.__version__)"], cwd=apart,
                          capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
    if not Path(said[0]).is_relative_to(folder) or said[1] != version:
        raise ValueError(f"The tests would run against {said[0]}, version {said[1]}.")
    subprocess.run([python, "-m", "linattn", "info"], cwd=apart, check=True)
    return subprocess.run([python, "-m", "pytest", "-q", "-k", SELECT], cwd=apart.parent, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
