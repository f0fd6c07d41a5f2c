// What a CPU kernel returns.
#pragma once

namespace lpmflow {

enum Status : int { kDone = 0, kOutOfMemory = 1, kNoFloat16 = 2, kOtherLines = 3 };

}  // namespace lpmflow
