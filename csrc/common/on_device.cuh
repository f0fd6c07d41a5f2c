// From what a caller says at run time, a type, a device and a stream, to the kernels compiled for that type.
#pragma once

#include "device.cuh"
#include "dtype.h"

namespace lpmflow {

// run(element, stream) with `device` current; of the element its type is what counts. A CUDA status: run's own, or that
// no kernel takes float64.
template <class Run>
int on_device(Dtype dtype, int device, void* stream, const Run& run) {
  const DeviceScope scope(device);
  if (scope.status() != cudaSuccess) return scope.status();
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case Dtype::kFloat32: return run(float{}, on);
    case Dtype::kFloat16: return run(Float16{}, on);
    case Dtype::kBFloat16: return run(BFloat16{}, on);
    case Dtype::kFloat64: break;
  }
  return cudaErrorNotSupported;
}

}  // namespace lpmflow
