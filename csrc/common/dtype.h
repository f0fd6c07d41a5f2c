// Element types as the Python side numbers them.
#pragma once

namespace lpmflow {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

}  // namespace lpmflow
