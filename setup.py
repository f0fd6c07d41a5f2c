"""Adds what pyproject.toml cannot say: the native module, and that `kernels/` is installed as `lpmflow_kernels`.

Under its own name it neither clashes with other people's `kernels` nor is hidden by the folder of that name when
Python runs in a checkout. How the native module is built is told in `csrc/build.py`.
"""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))

from build import BuildNative  # noqa: E402

kernels = ["lpmflow_kernels", *(f"lpmflow_kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[*find_packages(include=["lpmflow", "lpmflow.*"]), *kernels],
    package_dir={"lpmflow_kernels": "kernels"},
    ext_modules=[Extension("lpmflow_kernels._native", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
