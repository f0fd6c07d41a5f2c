"""Fast backends of lpmflow's operations: Triton kernels and the native extension, installed as `lpmflow_kernels`.

`lpmflow.ops` imports this package lazily, when a backend from it is asked for. It imports torch and triton, never
lpmflow. This version holds no kernel yet: every operation runs on the reference backend, and
`lpmflow.ops.backend_report()` says so.
"""
