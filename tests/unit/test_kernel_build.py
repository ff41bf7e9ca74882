"""The C++ kernels' build: found again, made anew when something changed, refused with a reason."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cluster.errors import EngineError
from jobs.kernels import build, native

needs_kernels = pytest.mark.skipif(
    build.why_impossible() is not None, reason=f"no kernels here: {build.why_impossible()}"
)


@needs_kernels
def test_build_when_nothing_changed_gives_the_same_file() -> None:
    first = build.build()
    written_ns = first.stat().st_mtime_ns
    assert build.build() == first
    assert first.stat().st_mtime_ns == written_ns


@needs_kernels
def test_main_when_built_prints_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main([]) == 0
    assert Path(capsys.readouterr().out.strip()) == build.build()


def test_main_when_there_is_no_compiler_says_so_and_does_not_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.main([]) == 0
    assert "PyTorch's operators will be used" in capsys.readouterr().err


AVX512 = "avx2 fma avx512f avx512bw avx512dq avx512vl avx512_vnni"


@pytest.mark.parametrize(
    ("flags", "wished", "chosen"),
    [
        (AVX512, "", "avx512"),
        (AVX512, "avx2", "avx2"),
        ("avx2 fma", "", "avx2"),
        ("avx2 fma avx512f avx512bw", "", "avx2"),
        ("avx2 fma", "avx512", None),
        ("sse4_2 avx", "", None),
    ],
)
def test_instruction_set_when_cpus_differ_is_the_best_or_as_wished(
    monkeypatch: pytest.MonkeyPatch, flags: str, wished: str, chosen: str | None
) -> None:
    monkeypatch.setattr(build, "_cpu_fields", lambda: {"flags": flags})
    monkeypatch.setenv("RAYSMITH_KERNELS", wished)
    found = build.instruction_set()
    assert (found.name if found else None) == chosen


@pytest.mark.parametrize(
    ("flags", "wished", "missing"),
    [("avx2", "", "fma"), ("avx2 fma avx512f avx512bw avx512dq avx512vl", "avx512", "avx512_vnni")],
)
def test_why_impossible_when_the_cpu_lacks_something_names_it(
    monkeypatch: pytest.MonkeyPatch, flags: str, wished: str, missing: str
) -> None:
    monkeypatch.setattr(build, "_cpu_fields", lambda: {"flags": flags})
    monkeypatch.setenv("RAYSMITH_KERNELS", wished)
    assert build.why_impossible() == f"this CPU lacks {missing}"


def test_instruction_set_when_wish_is_unknown_names_those_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAYSMITH_KERNELS", "sse9")
    with pytest.raises(EngineError, match="`sse9` is none of: avx512, avx2"):
        build.instruction_set()


def test_main_when_wish_is_unknown_fails_with_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAYSMITH_KERNELS", "sse9")
    assert build.main([]) == 1
    assert "`sse9` is none of" in capsys.readouterr().err


@pytest.mark.skipif(native.instruction_set() != "avx512", reason="this CPU has no other set")
def test_kernels_when_compiled_for_avx2_pass_their_tests() -> None:
    environment = os.environ | {"RAYSMITH_KERNELS": "avx2"}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    assert "libraysmith" in run("jobs.kernels.build")  # Else the tests would be skipped.
    names = ("native_linear", "native_ops", "fused", "low_rank", "ragged")
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in names]
    assert " passed" in run("pytest", "-q", *files)


@needs_kernels
@pytest.mark.parametrize("cpu", ["icelake-server", "sapphirerapids", "haswell"])
def test_sources_when_compiled_for_another_cpu_are_valid(cpu: str) -> None:
    # Whatever this CPU is, what others run is compiled at least: with AVX-512, with AMX, with AVX2.
    flags = [flag for flag in build._FLAGS if not flag.startswith("-march")]
    sources = sorted(map(str, build._SOURCES.glob("*.cpp")))
    command = [build._compiler(), *flags, f"-march={cpu}", "-fsyntax-only", *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@needs_kernels
def test_weight_layout_is_what_the_kernels_of_this_instruction_set_read() -> None:
    layouts = {"avx512": (32, 4, 128), "avx2": (16, 2, 0)}
    assert native.weight_layout() == layouts[str(native.instruction_set())]


@needs_kernels
def test_build_when_there_is_no_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EngineError, match=r"no C\+\+ compiler `no-such-compiler`.*install g\+\+"):
        build.build()


@needs_kernels
def test_build_when_the_compiler_fails_shows_the_command_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("RAYSMITH_CACHE", str(tmp_path))
    assert build.main([]) == 1
    assert "did not compile with `false " in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "kernels").iterdir()] == [".lock"]


def test_cache_folder_when_configured_is_that_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAYSMITH_CACHE", str(tmp_path))
    assert build.cache_folder() == tmp_path
    monkeypatch.delenv("RAYSMITH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / "raysmith"


@needs_kernels
def test_library_when_loaded_uses_the_openmp_runtime_of_torch() -> None:
    assert native.is_available()
    maps = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line}
    of_torch = {path for path in runtimes if path.startswith(str(Path(torch.__file__).parent))}
    needed = build.build().read_bytes()
    assert len(of_torch) == 1
    assert b"libgomp" not in needed


@needs_kernels
def test_function_when_there_is_none_of_that_name_fails_by_name() -> None:
    with pytest.raises(AttributeError, match="rs_no_such_kernel"):
        native.function("rs_no_such_kernel", "p")(None)


def test_why_unavailable_when_asked_twice_is_logged_at_most_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    native.why_unavailable()
    with caplog.at_level(logging.WARNING):
        native.why_unavailable()
    assert not caplog.records
