"""Memory and time of one match by image size: einsum maps, whole correlation tensors, and streamed ones.

Every way runs in a process of its own, so that the peak is its own. `lpmflow-tiny` with its weights; the network alone,
one pair, what is added to the memory of the loaded network.
"""

from __future__ import annotations

import memory
import pytest

SIZES = (256, 512, 768, 1024)
WAYS = {  # backend of every operation, whole tensors
    "einsum": ("reference", True),
    "native, whole": (None, True),
    "native, streamed": (None, False),
}
LARGEST = {"einsum": 512}  # at 768 pixels its maps alone are 2 GiB a time
SMALLEST = {"native, streamed": 768}  # below that a CPU's tensors fit, and streaming is the same


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES)
def test_image_size(size, way, device, report):
    if size > LARGEST.get(way, size):
        pytest.skip(f"{way} at {size} pixels takes more memory than a machine is likely to have")
    if size < SMALLEST.get(way, 0):
        pytest.skip(f"{way} at {size} pixels is the same as whole: the tensors fit")
    memory.skip_unless_known(device)
    backend, whole = WAYS[way]
    seconds, taken = memory.in_a_process(memory.of_image_size, size, backend, whole, str(device))
    report.add(
        "lpmflow-tiny by image size, one pair",
        pixels=size,
        cells=(size // 8) ** 2,
        way=way,
        seconds=seconds,
        MiB=taken / 2**20,
    )
