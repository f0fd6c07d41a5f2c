"""Memory and time of one match by image size: einsum maps, whole correlation tensors, and streamed ones.

Every way runs in a process of its own, so that the peak is its own. `lpmflow-tiny` with its weights; the network alone,
one pair, what is added to the memory of the loaded network.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SIZES = (256, 512, 768, 1024)
WAYS = {  # backend of every operation, whole tensors
    "einsum": ("reference", True),
    "native, whole": (None, True),
    "native, streamed": (None, False),
}
LARGEST = {"einsum": 512}  # at 768 pixels its maps alone are 2 GiB a time
SMALLEST = {"native, streamed": 768}  # below that a CPU's tensors fit, and streaming is the same

_RUN = """
import json, sys, time, torch
import lpmflow
from lpmflow import ops
size, backend, whole, device = int(sys.argv[1]), sys.argv[2] or None, sys.argv[3] == "1", torch.device(sys.argv[4])
model = lpmflow.Matcher(image_size=size, device=device).model
def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024
def run(side):
    torch.manual_seed(0)
    source, target = torch.randn(2, 1, 3, side, side, device=device)
    with torch.inference_mode(), ops.use_backend(backend):
        model(source, target, return_correlations=whole)
    if device.type == "cuda":
        torch.cuda.synchronize()
if device.type == "cuda":
    run(size)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
else:
    small = lpmflow.Matcher(device=device).model
    with torch.inference_mode():
        small(torch.zeros(1, 3, 192, 192), torch.zeros(1, 3, 192, 192))  # threads and libraries are not counted
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
begin = time.perf_counter()
run(size)
seconds = time.perf_counter() - begin
peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")
print(json.dumps({"seconds": seconds, "bytes": peak - before}))
"""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES)
def test_image_size(size, way, device, report):
    if size > LARGEST.get(way, size):
        pytest.skip(f"{way} at {size} pixels takes more memory than a machine is likely to have")
    if size < SMALLEST.get(way, 0):
        pytest.skip(f"{way} at {size} pixels is the same as whole: the tensors fit")
    if device.type == "cpu" and not sys.platform.startswith("linux"):
        pytest.skip("peak memory of the process is known on Linux only")
    backend, whole = WAYS[way]
    command = [sys.executable, "-c", _RUN, str(size), backend or "", "1" if whole else "0", str(device)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    report.add(
        "lpmflow-tiny by image size, one pair",
        pixels=size,
        cells=(size // 8) ** 2,
        way=way,
        seconds=found["seconds"],
        MiB=found["bytes"] / 2**20,
    )
