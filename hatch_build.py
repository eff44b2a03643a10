"""Compiles the kernels while weightsmith is installed or packed, with a compiler that pip brings along.

The library is plain C without Python's headers, so one wheel serves every Python of a platform. The compiler is
``zig cc`` (Clang) from the package ziglang, pinned: the same everywhere, and it targets an old glibc from any machine.

Environment:
    WEIGHTSMITH_CC: another compiler to use, GCC or Clang.
    WEIGHTSMITH_PURE: set to install without compiled kernels; everything then runs on NumPy, slower.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path("src/weightsmith/kernels/native")
# Contraction and fast-math would change results from machine to machine; registers are read as floats and as bits.
FLAGS = (
    "-O3",
    "-fPIC",
    "-std=c11",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
)
# Levels of the instruction set: the number in the names of the functions, zig's name and GCC's.
X86_LEVELS = ((0, "x86_64", "x86-64"), (3, "x86_64_v3", "x86-64-v3"), (4, "x86_64_v4", "x86-64-v4"))
GLIBC = "2.17"
# Compiled once for every level, with flags of their own; level.c, which chooses among levels, once. Compilers shun the
# widest vectors where they cannot tell how long a loop runs.
_WIDE = ("-mprefer-vector-width=512",)
KERNELS = {"machine": (), "measure": _WIDE, "pursuit": _WIDE}


class KernelsHook(BuildHookInterface[Any]):
    """Builds ``weightsmith_kernels`` beside its sources and tags the wheel for its platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, for wheels and editable installations."""
        if self.target_name != "wheel" or os.environ.get("WEIGHTSMITH_PURE"):
            return
        suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
        library = Path(self.root) / SOURCES / f"weightsmith_kernels.{suffix}"
        with tempfile.TemporaryDirectory() as folder:
            compile_library(Path(self.root) / SOURCES, library, Path(folder))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{wheel_platform()}"
        build_data["artifacts"].append(f"/{SOURCES}/{library.name}")


def compile_library(sources: Path, library: Path, folder: Path) -> None:
    """Compile every level into objects in a folder, and link them into one library."""
    own = os.environ.get("WEIGHTSMITH_CC")
    command = shlex.split(own) if own else [sys.executable, "-m", "ziglang", "cc", *zig_target()]
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": str(folder / "zig"), "ZIG_LOCAL_CACHE_DIR": str(folder / "zig")}

    def run(*arguments: str) -> None:
        subprocess.run([*command, *FLAGS, *arguments], check=True, env=environment)

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    objects = []
    for level, zig, gcc in X86_LEVELS if x86 else ((0, "", ""),):
        cpu = ([f"-march={gcc}"] if own else [f"-mcpu={zig}"]) if zig else []
        for name, own_flags in KERNELS.items():
            flags = [f"-DWS_LEVEL={level}", "-fvisibility=hidden", *cpu, *(own_flags if x86 else ())]
            objects.append(str(folder / f"{name}{level}.o"))
            run("-c", *flags, "-o", objects[-1], str(sources / f"{name}.c"))
    made = folder / library.name
    run("-shared", "-s", "-o", str(made), *objects, str(sources / "level.c"))
    # A process that runs on the old library keeps it: the new one takes its name, not its place.
    beside = library.with_suffix(".new")
    beside.write_bytes(made.read_bytes())
    beside.chmod(0o755)
    os.replace(beside, library)


def zig_target() -> list[str]:
    """Return the target to compile for: this machine, with an old C library where that is glibc."""
    if sys.platform != "linux":
        return []
    libc = f"gnu.{GLIBC}" if platform.libc_ver()[0] == "glibc" else "musl"
    return ["-target", f"{platform.machine()}-linux-{libc}"]


def wheel_platform() -> str:
    """Return the platform tag of a wheel that is built here."""
    import sysconfig

    plain = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    if sys.platform == "linux" and not os.environ.get("WEIGHTSMITH_CC") and platform.libc_ver()[0] == "glibc":
        return f"manylinux_{GLIBC.replace('.', '_')}_{platform.machine()}"
    return plain
