// The CPU kernels of every instruction set this module was built for, and the choice between them at run time.
#pragma once

#include "../correlation/correlation.h"

namespace lpmflow {

struct CpuKernels {
  const char* isa;
  bool (*supported)();  // by the machine we run on
  int (*correlation_forward)(const CorrelationForward&);
  int (*correlation_backward)(const CorrelationBackward&);
};

// Best first, ended by an entry whose isa is null.
extern const CpuKernels* const kCpuKernels;

}  // namespace lpmflow
