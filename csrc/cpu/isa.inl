// Body of one instruction set's translation unit: its CPU kernels, under names that kernels.cpp declares. Nothing here
// may run before it is known that the machine has the instructions, so there are no objects to initialise.
#include "../correlation/correlation_cpu.h"
#include "../cross_scale_fusion/cross_scale_fusion_cpu.h"
#include "../region_attention/region_attention_cpu.h"
#include "../window_refinement/window_refinement_cpu.h"
#include "../window_stage/window_stage_cpu.h"

namespace lpmflow {
namespace LPMFLOW_ISA {

int run_correlation_forward(const CorrelationForward& op) { return correlation_forward(op); }
int run_correlation_backward(const CorrelationBackward& op) { return correlation_backward(op); }
int run_cross_scale_fusion_forward(const CrossScaleFusion& op) { return cross_scale_fusion_forward(op); }
int run_cross_scale_fusion_backward(const CrossScaleFusionBackward& op) { return cross_scale_fusion_backward(op); }
int run_window_refinement_forward(const WindowForward& op) { return window_refinement_forward(op); }
int run_window_refinement_backward(const WindowBackward& op) { return window_refinement_backward(op); }
int run_region_attention_forward(const RegionAttentionForward& op) { return region_attention_forward(op); }
int run_region_attention_backward(const RegionAttentionBackward& op) { return region_attention_backward(op); }
int run_window_stage(const WindowStage& op) { return window_stage(op); }

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
