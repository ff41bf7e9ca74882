"""Compiles the C++ kernels beside this file (csrc/) for the CPU at hand.

Takes the sources; gives a shared library in the user's cache folder, under a name made of all it
depends on: sources, compiler, flags and CPU. A changed source or another CPU is therefore another
library, and a stale one is never loaded. It knows neither torch nor what the kernels compute.
Called by `make setup`, and by native.py where the library is missing.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cluster.errors import EngineError, RaysmithError
from cluster.storage import storage_errors

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-fopenmp",
    "-fPIC",
    "-fvisibility=hidden",
    # A product and a sum are joined into one rounding only where a kernel says so. Left to the
    # compiler, two variants of a loop would round differently, and a row's result would depend on
    # how many rows stand beside it. GCC joins intrinsics too.
    "-ffp-contract=off",
    # GCC 12 otherwise moves loads about and splits live ranges until the sums of a tile no longer
    # fit in registers: products of 8 and more rows took 2.5x the time.
    "-fno-tree-pre",
    "-fira-region=one",
    "-Wall",
    "-Wextra",
)
# Without -fopenmp here: the library names no OpenMP runtime of its own, so its calls bind to the
# one that torch has loaded, whichever file that is. Two runtimes would be two pools of threads.
_LINK_FLAGS = ("-shared", "-fPIC")
_TIMEOUT_S = 300.0


class InstructionSet(NamedTuple):
    """What the kernels are compiled for: the CPU flags it needs, as Linux names them."""

    name: str
    needs: tuple[str, ...]
    compiler_flags: tuple[str, ...]


# In order of preference; csrc/vector.h tells them apart by what the compiler may use.
_INSTRUCTION_SETS = (
    InstructionSet("avx512", ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"), ()),
    InstructionSet("avx2", ("avx2", "fma"), ("-mno-avx512f",)),
)


def cache_folder() -> Path:
    """Return where compiled kernels and measured choices are kept: `RAYSMITH_CACHE`, or the user's.

    Nothing in it is needed: whatever is deleted is made again.
    """
    if configured := os.environ.get("RAYSMITH_CACHE"):
        return Path(configured)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "raysmith"


def cpu_name() -> str:
    """Return the model of this machine's CPU with a digest of what it can do."""
    fields = _cpu_fields()
    flags = hashlib.sha256(fields.get("flags", "").encode()).hexdigest()[:8]
    return f"{fields.get('model name', os.uname().machine)} ({flags})"


def cpu_flags() -> frozenset[str]:
    """Return what this machine's CPU can do, as Linux names it; nothing elsewhere."""
    return frozenset(_cpu_fields().get("flags", "").split())


def instruction_set() -> InstructionSet | None:
    """Return what the kernels are compiled for here: the best that the CPU has, None if none.

    `RAYSMITH_KERNELS=avx2` asks for that one on any CPU. Raises EngineError for an unknown name.
    """
    names = [found.name for found in _INSTRUCTION_SETS]
    wished = os.environ.get("RAYSMITH_KERNELS")
    if wished and wished not in names:
        raise EngineError(f"RAYSMITH_KERNELS=`{wished}` is none of: {', '.join(names)}.")
    usable = [found for found in _INSTRUCTION_SETS if cpu_flags().issuperset(found.needs)]
    return next((found for found in usable if not wished or found.name == wished), None)


def why_impossible() -> str | None:
    """Return why this machine cannot build or run the kernels, or None.

    Raises EngineError if `RAYSMITH_KERNELS` names no instruction set.
    """
    if instruction_set() is None:
        wished = os.environ.get("RAYSMITH_KERNELS")
        least = next((s for s in _INSTRUCTION_SETS if s.name == wished), _INSTRUCTION_SETS[-1])
        return f"this CPU lacks {', '.join(f for f in least.needs if f not in cpu_flags())}"
    if shutil.which(_compiler()) is None:
        return f"no C++ compiler `{_compiler()}` was found (install g++, or set CXX)"
    return None


def build() -> Path:
    """Return the library's path, compiled first unless it is there already.

    Raises EngineError where `why_impossible` gives or raises one, or the compiler fails, and
    StorageError where the cache folder cannot be written.
    """
    if (reason := why_impossible()) is not None:
        raise EngineError(f"the C++ kernels cannot be built: {reason}.")
    common = _common_digest()
    objects = {source: _object_path(source, common) for source in sorted(_SOURCES.glob("*.cpp"))}
    names = " ".join(path.name for path in objects.values())
    library = _folder() / f"libraysmith-{_digest(names, *_LINK_FLAGS)}.so"
    if library.is_file():
        return library
    with storage_errors(f"building the C++ kernels in {library.parent}"):
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (library.parent / ".lock").open("w") as lock:
            # One process compiles, and those that start at the same time wait for its result.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.is_file():
                _compile_all(objects)
                _run([*_LINK_FLAGS, *map(str, objects.values())], library)
    return library


def main(argv: Sequence[str] | None = None) -> int:
    """Build the kernels and print where they are; a machine that cannot run them is no failure."""
    parser = argparse.ArgumentParser(prog="python -m jobs.kernels.build", description=main.__doc__)
    parser.parse_args(argv)
    try:
        if (reason := why_impossible()) is not None:
            sys.stderr.write(f"C++ kernels: {reason}; PyTorch's operators will be used instead.\n")
            return 0
        library = build()
    except RaysmithError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return error.exit_code
    sys.stdout.write(f"{library}\n")
    return 0


def _folder() -> Path:
    return cache_folder() / "kernels"


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _common_digest() -> str:
    """Return a digest of what every object depends on beside its own source."""
    version = subprocess.run(
        [_compiler(), "--version"], capture_output=True, text=True, check=False
    ).stdout
    headers = [path.read_text() for path in sorted(_SOURCES.glob("*.h"))]
    return _digest(cpu_name(), _compiler(), version, *_flags(), *headers)


def _flags() -> tuple[str, ...]:
    chosen = instruction_set()
    return (*_FLAGS, *chosen.compiler_flags) if chosen else _FLAGS


def _object_path(source: Path, common: str) -> Path:
    return _folder() / f"{source.stem}-{_digest(common, source.read_text())}.o"


def _compile_all(objects: dict[Path, Path]) -> None:
    missing = [(source, path) for source, path in objects.items() if not path.is_file()]
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda pair: _run([*_flags(), "-c", str(pair[0])], pair[1]), missing))


def _run(arguments: list[str], output: Path) -> None:
    """Run the compiler; `output` appears whole or not at all."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    command = [_compiler(), *arguments, "-o", str(temporary)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
        if done.returncode:
            raise EngineError(
                f"the C++ kernels did not compile with `{' '.join(command)}`:\n{done.stderr}"
            )
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def _cpu_fields() -> dict[str, str]:
    """Return the first processor's fields in /proc/cpuinfo; none where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    block = path.read_text().split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
