"""Builds `safe_kernels._C` from csrc/; everything that is not about the extension stands in pyproject.toml.

Environment: MAX_JOBS (parallel compilations), CXX (the compiler), SAFE_KERNELS_SANITIZE=1 (AddressSanitizer and UBSan),
SAFE_KERNELS_SKIP_EXTENSION=1 (Python files only, where build_ext is run by itself).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import __version__, find_packages, setup

ROOT = Path(__file__).parent.resolve()
SANITIZE = os.environ.get("SAFE_KERNELS_SANITIZE", "0") == "1"

# Warnings that follow from the optimiser's guesses after inlining torch's templates: reported, but no reason to stop.
GUESSED_WARNINGS = (
    "maybe-uninitialized",
    "array-bounds",
    "stringop-overflow",
    "stringop-overread",
    "nonnull",
    "restrict",
)

# Folders of csrc that are compiled with another, by the headers that they share. No unit may be called as a source is.
UNITS = {"": "python", "launch_replay": "python", "ops": "autograd", "aten": "autograd"}


def fail(sentence: str) -> None:
    """Ends the build with one sentence instead of a traceback."""
    sys.stderr.write(f"safe_kernels: {sentence}\n")
    raise SystemExit(1)


def check_setuptools() -> None:
    """Versions before 77 refuse the licence in pyproject.toml with a message of twenty lines."""
    if int(__version__.partition(".")[0]) < 77:
        fail(f"setuptools {__version__} is too old; install a newer one (pip install 'setuptools>=77') and try again.")


def find_compiler() -> str:
    """The C++ compiler to use, also put into CXX, which ninja's rules and setuptools' linker both read."""
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        if shutil.which(name.split()[0]):
            os.environ["CXX"] = name
            return name
    where = f"CXX={asked!r} names none that exists" if asked else "tried c++, g++ and clang++"
    fail(f"no C++ compiler found ({where}); install one (Debian, Ubuntu: apt-get install g++) or set CXX to its path.")
    raise AssertionError  # fail() does not return


def is_gcc(compiler: str) -> bool:
    """Whether the compiler is GCC itself, whatever name it goes by."""
    macros = subprocess.run([*compiler.split(), "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True)
    return "__GNUC__" in macros.stdout and "__clang__" not in macros.stdout


def compile_flags(compiler: str, torch_includes: list[str]) -> list[str]:
    """Flags for our own files; torch's headers count as system headers, so that our warnings stay ours."""
    # -g0: Python's own flags ask for debug information, which takes more than half of the compiler's time. Sanitizers
    # need lines alone (-g1), and optimising what they add takes longer than the tests that run it.
    flags = ["-O0", "-g1", "-fno-omit-frame-pointer"] if SANITIZE else ["-O3", "-g0"]
    flags += ["-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
    # No code asks which floating-point exceptions were raised, and GCC makes vector code of comparisons only then.
    flags.append("-fno-trapping-math")
    flags.append(f"-ffile-prefix-map={ROOT}/=")  # the dispatcher tells where a kernel was registered: csrc/...
    for folder in torch_includes:
        flags += ["-isystem", folder]
    if is_gcc(compiler):
        flags += [f"-Wno-error={name}" for name in GUESSED_WARNINGS]
        if platform.system() == "Linux":
            # Compiled for at::parallel_for, never linked: the GOMP_ symbols then come from the one libgomp that torch
            # itself loaded, whatever that copy is called, and not from a second thread pool.
            flags.append("-fopenmp")
    if SANITIZE:
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    return flags


def write_units(sources: list[str], folder: Path) -> list[str]:
    """One file per folder of csrc that includes the folder's sources, which so read torch's headers once.

    Those headers take three quarters of the compiler's time. Names in anonymous namespaces have to differ within a
    folder. A unit that has not changed is left as it is, and ninja knows the sources that it includes.

    Args:
        sources: the sources, as paths from the root.
        folder: where the units are written.

    Returns:
        Paths of the units.
    """
    units: dict[str, str] = {}
    for source in sources:
        path = Path(source).relative_to("csrc")
        unit = UNITS.get(path.parent.name, path.parent.name)
        units[unit] = units.get(unit, "") + f'#include "{path.as_posix()}"\n'
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in units.items():
        unit = folder / f"{name}.cpp"
        if not unit.exists() or unit.read_text() != text:
            unit.write_text(text)
    return [str(folder / f"{name}.cpp") for name in units]


def options() -> dict[str, object]:
    """The part of setup()'s arguments that needs torch and a compiler."""
    if os.environ.get("SAFE_KERNELS_SKIP_EXTENSION", "0") == "1":
        return {}
    if importlib.util.find_spec("torch") is None:
        fail(
            f"torch is not installed for {sys.executable}; install it first (pip install torch), then: "
            "pip install --no-build-isolation -e ."
        )
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    class Build(BuildExtension):  # type: ignore[misc]
        """Looks for the compiler when something is to be compiled, not when pip only asks for metadata."""

        def build_extensions(self) -> None:
            flags = compile_flags(find_compiler(), include_paths())
            for extension in self.extensions:
                extension.depends += extension.sources
                extension.sources = write_units(extension.sources, Path(self.build_temp) / "units")
                extension.extra_compile_args = {"cxx": flags}
                extension.extra_link_args = ["-fsanitize=address,undefined"] if SANITIZE else []
            super().build_extensions()

        def run(self) -> None:
            find_compiler()  # before setuptools settles on a linker
            super().run()

    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    extension = CppExtension("safe_kernels._C", sources, include_dirs=[str(ROOT / "csrc")], depends=headers)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


check_setuptools()
setup(
    packages=[
        *find_packages(".", include=["safe_kernels", "safe_kernels.*"]),
        *find_packages("python", include=["safe_peft", "safe_peft.*"]),
    ],
    package_dir={"safe_kernels": "safe_kernels", "safe_peft": "python/safe_peft"},
    package_data={"safe_kernels": ["py.typed", "*.pyi"], "safe_peft": ["py.typed"]},
    **options(),
)
