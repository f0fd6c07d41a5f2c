"""Adds what pyproject.toml cannot say: the folder `kernels/` is installed as the package `lpmflow_kernels`.

Under its own name it neither clashes with other people's `kernels` nor is hidden by the folder of that name when
Python runs in a checkout. Everything else is in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lpmflow", "lpmflow.*"]), "lpmflow_kernels"],
    package_dir={"lpmflow_kernels": "kernels"},
)
