"""Builds `lpmflow_kernels._native` from this folder with ninja: C++ wherever a compiler is, CUDA where nvcc is.

Used by setup.py. No torch is needed, so the module fits every torch and can be built in an isolated environment.

Without a C++ compiler nothing is built and the installation still succeeds; a compiler that is there and fails is an
error that says why. Either way `native_build.json` beside the module tells what was built and what not, and why.

Environment variables:
    CXX                 the C++ compiler (default: the first of g++, clang++, c++)
    MAX_JOBS            how many compilations at once (default: ninja's choice)
    LPMFLOW_CUDA        0: no CUDA kernels; 1: an error when they cannot be built (default: built where nvcc is)
    LPMFLOW_CUDA_ARCHS  such as "80;90a" (default: 80, 86, 89, 90a and 100, those that nvcc knows)
    CUDA_HOME           the CUDA toolkit (default: that of the nvcc on the PATH, or /usr/local/cuda)
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools.command.build_ext import build_ext

SOURCES = Path(__file__).resolve().parent
REPORT = "native_build.json"
CUDA_ARCHS = ("80", "86", "89", "90a", "100")

# Translation unit -> its own compiler options; the ones an x86-64 machine cannot run are chosen against at run time.
_X86 = {
    "cpu/isa_avx512.cpp": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mbmi2",
    "cpu/isa_avx2.cpp": "-mavx2 -mfma -mf16c -mbmi2",
}
_EVERYWHERE = {"cpu/isa_baseline.cpp": "", "cpu/kernels.cpp": "", "module.cpp": ""}


_OPENMP_PROGRAM = """
int main() {
  int total = 0;
#pragma omp parallel for reduction(+ : total)
  for (int i = 0; i < 4; ++i) total += i;
  return total - 6;
}
"""


class BuildNative(build_ext):
    """setuptools' `build_ext`, with ninja in the place of its compiler classes; it has one extension to build."""

    def run(self) -> None:
        (extension,) = self.extensions
        inplace, self.inplace = self.inplace, False
        built = Path(self.get_ext_fullpath(extension.name)).resolve()
        self.inplace = inplace
        # An editable installation uses the module where its package lies.
        target = Path(self.get_ext_fullpath(extension.name)).resolve() if inplace else built
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp).resolve() / "native"
        report = build(target, work)
        self._made = [str(path) for path in (target, target.parent / REPORT) if path.exists()]
        if report["reason"]:
            self.warn(f"lpmflow is installed without its native kernels: {report['reason']}")

    def get_outputs(self) -> list[str]:
        return list(getattr(self, "_made", []))

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def build(target: Path, work: Path) -> dict[str, Any]:
    """Build the module at `target`, objects in the folder `work`; the report, which is also written beside it."""
    report: dict[str, Any] = {"compiler": None, "openmp": False, "cuda_archs": [], "cuda_reason": None, "reason": None}
    target.unlink(missing_ok=True)
    compiler = find_compiler()
    if compiler is None:
        report["reason"] = "no C++ compiler was found when it was built (g++ or clang++, or the one CXX names)"
        report["cuda_reason"] = report["reason"]
        if os.environ.get("LPMFLOW_CUDA") == "1":
            raise RuntimeError(f"LPMFLOW_CUDA=1, but {report['reason']}")
    else:
        report["compiler"] = _version(compiler)
        report["openmp"] = has_openmp(compiler)
        nvcc, report["cuda_reason"] = find_nvcc()
        report["cuda_archs"] = cuda_archs(nvcc) if nvcc else []
        work.mkdir(parents=True, exist_ok=True)
        script = ninja_file(target, compiler, nvcc, report["cuda_archs"], openmp=report["openmp"])
        (work / "build.ninja").write_text(script, encoding="utf-8")
        _run_ninja(work)
    (target.parent / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def find_compiler() -> str | None:
    """The C++ compiler to use, None when there is none."""
    named = os.environ.get("CXX")
    if named:
        found = shutil.which(shlex.split(named)[0])
        if found is None:
            raise RuntimeError(f"CXX must name a C++ compiler, got {named!r}")
        return named
    if sys.platform == "win32":  # its compilers are not what the sources are written for
        return None
    return next((shlex.quote(found) for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)


def find_nvcc() -> tuple[str | None, str | None]:
    """(nvcc, None), or (None, the reason why there are no CUDA kernels)."""
    wanted = os.environ.get("LPMFLOW_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise RuntimeError(f"LPMFLOW_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None, "it was built with LPMFLOW_CUDA=0"
    if not cuda_sources():
        return None, "this version has no CUDA kernels"
    home = os.environ.get("CUDA_HOME")
    places = [Path(home) / "bin/nvcc"] if home else [Path(shutil.which("nvcc") or ""), Path("/usr/local/cuda/bin/nvcc")]
    found = next((str(place) for place in places if place.is_file()), None)
    if found is None:
        reason = f"no nvcc was found when it was built ({'in CUDA_HOME' if home else 'on the PATH'})"
        if wanted == "1":
            raise RuntimeError(f"LPMFLOW_CUDA=1, but {reason}")
        return None, reason
    return found, None


def cuda_archs(nvcc: str) -> list[str]:
    """The architectures to compile for: LPMFLOW_CUDA_ARCHS, or those of ours that this nvcc knows."""
    named = [arch for arch in os.environ.get("LPMFLOW_CUDA_ARCHS", "").replace(",", ";").split(";") if arch.strip()]
    if named:
        return [arch.strip().replace(".", "") for arch in named]
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    known = {line.removeprefix("compute_") for line in listed}
    return [arch for arch in CUDA_ARCHS if arch.rstrip("a") in known]


def cuda_sources() -> list[Path]:
    """Every .cu file."""
    return sorted(SOURCES.rglob("*.cu"))


def pybind11_headers() -> str:
    """The folder to include: pybind11's own, or the copy that an installed PyTorch brings."""
    try:
        import pybind11
    except ImportError:
        torch = importlib.util.find_spec("torch")  # not imported: finding its files is enough
        folder = Path(torch.origin).parent / "include" if torch is not None and torch.origin else None
        if folder is None or not (folder / "pybind11").is_dir():
            raise RuntimeError("building the native kernels of lpmflow needs pybind11: pip install pybind11") from None
        return str(folder)
    include: str = pybind11.get_include()
    return include


def ninja_file(target: Path, compiler: str, nvcc: str | None, archs: list[str], *, openmp: bool) -> str:
    """The text of build.ninja."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    units = {**(_X86 if x86 else {}), **_EVERYWHERE}
    includes = [pybind11_headers(), sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    flags += ["-DLPMFLOW_X86=1"] if x86 else []
    flags += [f"-DLPMFLOW_CUDA_ARCHS='\"{' '.join(archs)}\"'"] if nvcc else []
    flags += ["-fopenmp"] if openmp else ["-Wno-unknown-pragmas"]
    flags += [f"-isystem {_quote(path)}" for path in dict.fromkeys(includes)]
    link = ["-shared", *(["-undefined dynamic_lookup"] if sys.platform == "darwin" else [])]
    link += ["-fopenmp"] if openmp else []
    lines = [
        f"cxx = {compiler.replace('$', '$$')}",
        f"flags = {' '.join(flags)}",
        "rule cxx",
        "  command = $cxx $flags $options -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $linker $in -o $out $options",
    ]
    objects = []
    for unit, options in units.items():
        objects.append(unit.replace("/", "_") + ".o")
        lines += [f"build {objects[-1]}: cxx {_escape(SOURCES / unit)}", f"  options = {options}"]
    if nvcc:
        lines += [
            f"nvcc = {_quote(nvcc)}",
            "rule nvcc",
            "  command = $nvcc $options -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        options = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler -fPIC,-fvisibility=hidden"]
        options += [f"-ccbin {_quote(host_compiler(compiler))}"]
        options += [] if os.environ.get("MAX_JOBS") else ["--threads 2"]
        options += [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
        newest = max((arch for arch in archs if arch.isdigit()), key=int, default=None)
        options += [f"-gencode arch=compute_{newest},code=compute_{newest}"] if newest else []
        for source in cuda_sources():
            objects.append(f"{source.stem}.cu.o")
            lines += [f"build {objects[-1]}: nvcc {_escape(source)}", f"  options = {' '.join(options)}"]
        # nvcc knows where its own runtime library lies
        link = ["-shared", "--cudart static", f"-ccbin {_quote(host_compiler(compiler))}"]
        link += ["-Xcompiler -fopenmp"] if openmp else []
    lines.append(f"linker = {_quote(nvcc) if nvcc else '$cxx'}")
    lines += [f"build {_escape(target)}: link {' '.join(objects)}", f"  options = {' '.join(link)}"]
    return "\n".join([*lines, f"default {_escape(target)}", ""])


def _run_ninja(work: Path) -> None:
    jobs = os.environ.get("MAX_JOBS")
    command = [*_ninja(), "-C", str(work), *(["-j", jobs] if jobs else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 0:
        return
    problem = next((line for line in done.stdout.splitlines() if "error" in line.lower()), done.stdout.strip()[-500:])
    advice = " (LPMFLOW_CUDA=0 installs without the CUDA kernels)" if ".cu" in problem or "nvcc" in problem else ""
    print(done.stdout, file=sys.stderr)
    raise RuntimeError(f"the native kernels of lpmflow do not compile: {problem.strip()}{advice}")


def _ninja() -> list[str]:
    try:
        import ninja  # noqa: F401
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise RuntimeError("building the native kernels of lpmflow needs ninja: pip install ninja") from None
        return [found]
    return [sys.executable, "-m", "ninja"]


def _version(compiler: str) -> str:
    done = subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True)
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else compiler


def has_openmp(compiler: str) -> bool:
    """Whether the compiler has OpenMP and its runtime library: a program is linked, where nothing may be missing."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(_OPENMP_PROGRAM, encoding="utf-8")
        command = [*shlex.split(compiler), "-fopenmp", str(source), "-o", str(source.with_suffix(""))]
        return subprocess.run(command, capture_output=True).returncode == 0


def host_compiler(compiler: str) -> str:
    """The program that compiles, of a command such as "ccache g++ -m64": what nvcc wants to know."""
    words = [word for word in shlex.split(compiler) if not word.startswith("-")]
    return words[-1]


def _quote(path: object) -> str:
    """A path as one word of a command, inside a ninja variable."""
    return shlex.quote(str(path)).replace("$", "$$")


def _escape(path: object) -> str:
    """A path in a ninja `build` line; ninja quotes it for the shell itself."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
