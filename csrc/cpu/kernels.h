// The CPU kernels of every instruction set this module was built for, and the choice between them at run time.
#pragma once

#include "../correlation/correlation.h"
#include "../cross_scale_fusion/cross_scale_fusion.h"
#include "../region_attention/region_attention.h"
#include "../window_refinement/window_refinement.h"
#include "../window_stage/window_stage.h"

namespace lpmflow {

struct CpuKernels {
  const char* isa;
  bool (*supported)();  // by the machine we run on
  int (*correlation_forward)(const CorrelationForward&);
  int (*correlation_backward)(const CorrelationBackward&);
  int (*cross_scale_fusion_forward)(const CrossScaleFusion&);
  int (*cross_scale_fusion_backward)(const CrossScaleFusionBackward&);
  int (*region_attention_forward)(const RegionAttentionForward&);
  int (*region_attention_backward)(const RegionAttentionBackward&);
  int (*window_refinement_forward)(const WindowForward&);
  int (*window_refinement_backward)(const WindowBackward&);
  int (*window_stage)(const WindowStage&);
};

// Best first, ended by an entry whose isa is null.
extern const CpuKernels* const kCpuKernels;

}  // namespace lpmflow
