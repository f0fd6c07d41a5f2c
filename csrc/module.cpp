// The Python module lpmflow_kernels._native. Tensors come as addresses, sizes and strides, checked by the caller;
// nothing here knows PyTorch. Functions return 0, or a status the caller turns into an exception.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "correlation/correlation.h"
#include "cpu/kernels.h"
#if defined(LPMFLOW_CUDA_ARCHS)
#include "correlation/correlation_cuda.h"
#include "cross_scale_fusion/cross_scale_fusion_cuda.h"
#include "region_attention/region_attention_cuda.h"
#include "window_refinement/window_refinement_cuda.h"
#else
#define LPMFLOW_CUDA_ARCHS ""
#define LPMFLOW_NO_CUDA 1
#endif

namespace py = pybind11;
using namespace lpmflow;

namespace {

using Address = uintptr_t;

const CpuKernels* chosen = nullptr;  // set when the module is loaded

const CpuKernels& kernels() { return *chosen; }

Rows rows(Address data, const py::tuple& strides) {
  return {reinterpret_cast<const void*>(data), strides[0].cast<int64_t>(), strides[1].cast<int64_t>(),
          strides[2].cast<int64_t>()};
}

CorrelationShape shape(const py::tuple& sizes, int64_t prefix, double scale, int dtype, int threads) {
  return {sizes[0].cast<int64_t>(), sizes[1].cast<int64_t>(), sizes[2].cast<int64_t>(), sizes[3].cast<int64_t>(),
          sizes[4].cast<int64_t>(), prefix, scale, static_cast<Dtype>(dtype), threads};
}

int correlation_forward(const py::tuple& sizes, int64_t prefix, double scale, int dtype, int threads, Address q,
                        const py::tuple& q_strides, Address k, const py::tuple& k_strides, Address v,
                        const py::tuple& v_strides, Address attended, Address corr) {
  const CorrelationForward op{shape(sizes, prefix, scale, dtype, threads), rows(q, q_strides), rows(k, k_strides),
                              rows(v, v_strides), reinterpret_cast<void*>(attended), reinterpret_cast<void*>(corr)};
  py::gil_scoped_release released;
  return kernels().correlation_forward(op);
}

int correlation_backward(const py::tuple& sizes, int64_t prefix, double scale, int dtype, int threads, Address q,
                         const py::tuple& q_strides, Address k, const py::tuple& k_strides, Address v,
                         const py::tuple& v_strides, Address grad_attended, const py::tuple& grad_attended_strides,
                         Address grad_corr, const py::tuple& grad_corr_strides, Address grad_q, Address grad_k,
                         Address grad_v) {
  const CorrelationBackward op{shape(sizes, prefix, scale, dtype, threads),
                               rows(q, q_strides),
                               rows(k, k_strides),
                               rows(v, v_strides),
                               rows(grad_attended, grad_attended_strides),
                               reinterpret_cast<const void*>(grad_corr),
                               grad_corr_strides[0].cast<int64_t>(),
                               grad_corr_strides[1].cast<int64_t>(),
                               reinterpret_cast<void*>(grad_q),
                               reinterpret_cast<void*>(grad_k),
                               reinterpret_cast<void*>(grad_v)};
  py::gil_scoped_release released;
  return kernels().correlation_backward(op);
}

// (corr, batch stride, row stride, hs, ws, ht, wt, first line, lines, grad)
FusionScale fusion_scale(const py::handle& item) {
  const py::tuple s = py::cast<py::tuple>(item);
  return {reinterpret_cast<const void*>(s[0].cast<Address>()), s[1].cast<int64_t>(), s[2].cast<int64_t>(),
          s[3].cast<int64_t>(), s[4].cast<int64_t>(), s[5].cast<int64_t>(), s[6].cast<int64_t>(),
          s[7].cast<int64_t>(), s[8].cast<int64_t>(), reinterpret_cast<void*>(s[9].cast<Address>())};
}

// sizes: batch, h, w, first row, rows. The result points into `kept`.
CrossScaleFusion fusion(std::vector<FusionScale>& kept, const py::list& scales, const py::tuple& sizes,
                        double temperature, int dtype, int threads, Address x, Address y, Address mapping,
                        Address confidence, Address largest) {
  for (const py::handle& item : scales) kept.push_back(fusion_scale(item));
  return {kept.data(),
          int64_t(kept.size()),
          sizes[0].cast<int64_t>(),
          sizes[1].cast<int64_t>(),
          sizes[2].cast<int64_t>(),
          sizes[3].cast<int64_t>(),
          sizes[4].cast<int64_t>(),
          temperature,
          static_cast<Dtype>(dtype),
          threads,
          reinterpret_cast<const void*>(x),
          reinterpret_cast<const void*>(y),
          reinterpret_cast<void*>(mapping),
          reinterpret_cast<void*>(confidence),
          reinterpret_cast<void*>(largest)};
}

int cross_scale_fusion_forward(const py::list& scales, const py::tuple& sizes, double temperature, int dtype,
                               int threads, Address x, Address y, Address mapping, Address confidence,
                               Address largest) {
  std::vector<FusionScale> kept;
  const CrossScaleFusion op =
      fusion(kept, scales, sizes, temperature, dtype, threads, x, y, mapping, confidence, largest);
  py::gil_scoped_release released;
  return kernels().cross_scale_fusion_forward(op);
}

int cross_scale_fusion_backward(const py::list& scales, const py::tuple& sizes, double temperature, int dtype,
                                int threads, Address x, Address y, Address mapping, Address confidence,
                                Address largest, Address grad_mapping, Address grad_x, Address grad_y) {
  std::vector<FusionScale> kept;
  const CrossScaleFusionBackward op{
      fusion(kept, scales, sizes, temperature, dtype, threads, x, y, mapping, confidence, largest),
      reinterpret_cast<const void*>(grad_mapping), reinterpret_cast<void*>(grad_x), reinterpret_cast<void*>(grad_y)};
  py::gil_scoped_release released;
  return kernels().cross_scale_fusion_backward(op);
}

Cells cells(Address data, const py::tuple& strides) {
  return {reinterpret_cast<const void*>(data), strides[0].cast<int64_t>(), strides[1].cast<int64_t>(),
          strides[2].cast<int64_t>()};
}

WindowShape window_shape(const py::tuple& sizes, double scale, int dtype, int threads) {
  return {sizes[0].cast<int64_t>(), sizes[1].cast<int64_t>(), sizes[2].cast<int64_t>(), sizes[3].cast<int64_t>(),
          sizes[4].cast<int64_t>(), sizes[5].cast<int64_t>(), sizes[6].cast<int64_t>(), scale,
          static_cast<Dtype>(dtype), threads};
}

int window_refinement_forward(const py::tuple& sizes, double scale, int dtype, int threads, Address qkv,
                              const py::tuple& qkv_strides, Address table, Address out) {
  const WindowForward op{window_shape(sizes, scale, dtype, threads), cells(qkv, qkv_strides),
                         reinterpret_cast<const void*>(table), reinterpret_cast<void*>(out)};
  py::gil_scoped_release released;
  return kernels().window_refinement_forward(op);
}

int window_refinement_backward(const py::tuple& sizes, double scale, int dtype, int threads, Address qkv,
                               const py::tuple& qkv_strides, Address grad_out, const py::tuple& grad_out_strides,
                               Address table, Address grad_qkv, Address grad_table) {
  const WindowBackward op{window_shape(sizes, scale, dtype, threads), cells(qkv, qkv_strides),
                          cells(grad_out, grad_out_strides), reinterpret_cast<const void*>(table),
                          reinterpret_cast<void*>(grad_qkv), reinterpret_cast<void*>(grad_table)};
  py::gil_scoped_release released;
  return kernels().window_refinement_backward(op);
}

// sizes: B, H, D, prefix, and height and width of the source and of the target grid.
RegionAttentionShape region_shape(const py::tuple& sizes, double scale, int dtype, int threads) {
  int64_t size[8];
  for (int i = 0; i < 8; ++i) size[i] = sizes[i].cast<int64_t>();
  return {size[0], size[1], size[2], size[3], {size[4], size[6]}, {size[5], size[7]}, scale, static_cast<Dtype>(dtype),
          threads};
}

int region_attention_forward(const py::tuple& sizes, double scale, int dtype, int threads, Address q,
                             const py::tuple& q_strides, Address k, const py::tuple& k_strides, Address v,
                             const py::tuple& v_strides, Address table, Address attended) {
  const RegionAttentionForward op{region_shape(sizes, scale, dtype, threads), rows(q, q_strides), rows(k, k_strides),
                                  rows(v, v_strides), reinterpret_cast<const void*>(table),
                                  reinterpret_cast<void*>(attended)};
  py::gil_scoped_release released;
  return kernels().region_attention_forward(op);
}

int region_attention_backward(const py::tuple& sizes, double scale, int dtype, int threads, Address q,
                              const py::tuple& q_strides, Address k, const py::tuple& k_strides, Address v,
                              const py::tuple& v_strides, Address table, Address grad_attended,
                              const py::tuple& grad_attended_strides, Address grad_q, Address grad_k, Address grad_v,
                              Address grad_table) {
  const RegionAttentionBackward op{region_shape(sizes, scale, dtype, threads),
                                   rows(q, q_strides),
                                   rows(k, k_strides),
                                   rows(v, v_strides),
                                   reinterpret_cast<const void*>(table),
                                   rows(grad_attended, grad_attended_strides),
                                   reinterpret_cast<void*>(grad_q),
                                   reinterpret_cast<void*>(grad_k),
                                   reinterpret_cast<void*>(grad_v),
                                   reinterpret_cast<void*>(grad_table)};
  py::gil_scoped_release released;
  return kernels().region_attention_backward(op);
}

LayerWeights layer(const py::tuple& layers, int i) {
  const py::tuple pair = layers[i].cast<py::tuple>();
  return {reinterpret_cast<const void*>(pair[0].cast<Address>()),
          reinterpret_cast<const void*>(pair[1].cast<Address>())};
}

// layers: (weight, bias) of norm1, qkv, proj, norm2, fc1, fc2, norm_out.
int window_stage(const py::tuple& sizes, double scale, int dtype, int threads, int64_t hidden, double eps, Address x,
                 const py::tuple& x_strides, const py::tuple& layers, Address table, Address out, Address mean,
                 Address highest) {
  const WindowStage op{window_shape(sizes, scale, dtype, threads),
                       hidden,
                       eps,
                       cells(x, x_strides),
                       layer(layers, 0),
                       layer(layers, 1),
                       layer(layers, 2),
                       layer(layers, 3),
                       layer(layers, 4),
                       layer(layers, 5),
                       layer(layers, 6),
                       reinterpret_cast<const void*>(table),
                       reinterpret_cast<void*>(out),
                       reinterpret_cast<void*>(mean),
                       reinterpret_cast<void*>(highest)};
  py::gil_scoped_release released;
  return kernels().window_stage(op);
}

#if !defined(LPMFLOW_NO_CUDA)
void read_strides(int64_t (&to)[3], const py::tuple& strides) {
  for (int axis = 0; axis < 3; ++axis) to[axis] = strides[axis].cast<int64_t>();
}

int correlation_forward_on_cuda(const py::tuple& sizes, int64_t prefix, double scale, int dtype, int device,
                                Address stream, Address q, const py::tuple& q_strides, Address k,
                                const py::tuple& k_strides, Address v, const py::tuple& v_strides, Address attended,
                                Address corr, Address lse) {
  CorrelationCudaArgs args{};
  args.q = reinterpret_cast<const void*>(q);
  args.k = reinterpret_cast<const void*>(k);
  args.v = reinterpret_cast<const void*>(v);
  read_strides(args.q_stride, q_strides);
  read_strides(args.k_stride, k_strides);
  read_strides(args.v_stride, v_strides);
  args.attended = reinterpret_cast<void*>(attended);
  args.corr = reinterpret_cast<float*>(corr);
  args.lse = reinterpret_cast<float*>(lse);
  const CorrelationShape s = shape(sizes, prefix, scale, dtype, 1);
  args.batch = s.batch;
  args.heads = s.heads;
  args.n = s.n;
  args.m = s.m;
  args.width = s.width;
  args.prefix = prefix;
  args.scale = static_cast<float>(scale);
  args.dtype = s.dtype;
  return correlation_forward_cuda(args, device, reinterpret_cast<void*>(stream));
}

int cross_scale_fusion_forward_on_cuda(const py::list& scales, const py::tuple& sizes, double temperature, int dtype,
                                       int device, Address stream, Address x, Address y, Address mapping,
                                       Address confidence, Address largest) {
  // Not 0, so that -inf stays -inf, and not infinite, so that 0 stays 0.
  const double exponent = std::min(std::max(1.4426950408889634 / temperature, 1e-30), 1e30);
  FusionCudaArgs args{};
  args.scales = static_cast<int64_t>(scales.size());
  args.batch = sizes[0].cast<int64_t>();
  args.h = sizes[1].cast<int64_t>();
  args.w = sizes[2].cast<int64_t>();
  args.first_row = sizes[3].cast<int64_t>();
  args.rows = sizes[4].cast<int64_t>();
  args.exponent = static_cast<float>(exponent);
  args.dtype = static_cast<Dtype>(dtype);
  args.x = reinterpret_cast<const float*>(x);
  args.y = reinterpret_cast<const float*>(y);
  args.mapping = reinterpret_cast<float*>(mapping);
  args.confidence = reinterpret_cast<float*>(confidence);
  args.largest = reinterpret_cast<float*>(largest);
  for (args.first_scale = 0; args.first_scale < args.scales; args.first_scale += kMostScales) {
    args.count = std::min<int64_t>(args.scales - args.first_scale, kMostScales);
    for (int64_t s = 0; s < args.count; ++s) args.scale[s] = fusion_scale(scales[args.first_scale + s]);
    const int status = cross_scale_fusion_forward_cuda(args, device, reinterpret_cast<void*>(stream));
    if (status != 0) return status;
  }
  return 0;
}

int window_refinement_forward_on_cuda(const py::tuple& sizes, double scale, int dtype, int device, Address stream,
                                      Address qkv, const py::tuple& qkv_strides, Address table, Address out) {
  const WindowCudaArgs args{window_shape(sizes, scale, dtype, 1), cells(qkv, qkv_strides),
                            reinterpret_cast<const float*>(table), reinterpret_cast<void*>(out)};
  return window_refinement_forward_cuda(args, device, reinterpret_cast<void*>(stream));
}

int region_attention_forward_on_cuda(const py::tuple& sizes, double scale, int dtype, int device, Address stream,
                                     Address q, const py::tuple& q_strides, Address k, const py::tuple& k_strides,
                                     Address v, const py::tuple& v_strides, Address table, Address attended,
                                     Address statistics) {
  const RegionCudaArgs args{region_shape(sizes, scale, dtype, 1),
                            rows(q, q_strides),
                            rows(k, k_strides),
                            rows(v, v_strides),
                            reinterpret_cast<const float*>(table),
                            reinterpret_cast<void*>(attended),
                            reinterpret_cast<float*>(statistics)};
  return region_attention_forward_cuda(args, device, reinterpret_cast<void*>(stream));
}
#endif

py::list instruction_sets() {
  py::list found;
  for (const CpuKernels* k = kCpuKernels; k->isa != nullptr; ++k) {
    if (k->supported()) found.append(k->isa);
  }
  return found;
}

bool use_instruction_set(const std::string& name) {
  for (const CpuKernels* k = kCpuKernels; k->isa != nullptr; ++k) {
    if (name == k->isa && k->supported()) {
      chosen = k;
      return true;
    }
  }
  return false;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  chosen = kCpuKernels;
  while (!chosen->supported()) ++chosen;
  m.doc() = "Native kernels of lpmflow; use them through lpmflow.ops.";
  m.attr("cuda_architectures") = LPMFLOW_CUDA_ARCHS;  // separated by blanks; empty without CUDA kernels
  m.def("instruction_sets", &instruction_sets, "Names of those this machine can run, best first.");
  m.def("instruction_set", [] { return kernels().isa; }, "The one in use.");
  m.def("use_instruction_set", &use_instruction_set, "False when the name is not one of instruction_sets().");
#if defined(__FLT16_MANT_DIG__)
  m.attr("float16") = true;  // whether the compiler knew 16-bit floats
#else
  m.attr("float16") = false;
#endif
  m.def("correlation_forward", &correlation_forward);
  m.def("correlation_backward", &correlation_backward);
  m.def("cross_scale_fusion_forward", &cross_scale_fusion_forward);
  m.def("cross_scale_fusion_backward", &cross_scale_fusion_backward);
  m.def("window_refinement_forward", &window_refinement_forward);
  m.def("window_refinement_backward", &window_refinement_backward);
  m.def("region_attention_forward", &region_attention_forward);
  m.def("region_attention_backward", &region_attention_backward);
  m.def("window_stage", &window_stage);
#if !defined(LPMFLOW_NO_CUDA)
  m.def("correlation_forward_cuda", &correlation_forward_on_cuda);
  m.def("cross_scale_fusion_forward_cuda", &cross_scale_fusion_forward_on_cuda);
  m.def("window_refinement_forward_cuda", &window_refinement_forward_on_cuda);
  m.def("region_attention_forward_cuda", &region_attention_forward_on_cuda);
#endif
}
