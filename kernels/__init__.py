"""Fast backends of lpmflow's operations: Triton kernels, one page an operation, and in `native` the compiled module.

`lpmflow.ops` imports the page it needs when an operation runs on it; each page registers its operators. This package
imports torch and triton, never lpmflow. README.md beside this file says which kernel has passed its tests on what.
"""
