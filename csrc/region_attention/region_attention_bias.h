// The region bias by index arithmetic: rows of the (N, N) bias of one head, and what a row of gradients adds to the table.
//
// In the table the four regions of an offset lie beside each other, and a row of keys (r', all c') of one image reads
// it backwards in steps of four. Laid out anew, as [2 a + b][row offset][column offset, backwards], that is one run.
#pragma once

#include "../cpu/simd.h"
#include "region_attention.h"

namespace lpmflow {
namespace LPMFLOW_ISA {

template <class T>
class RegionBias {
 public:
  explicit RegionBias(const RegionAttentionShape& s)
      : s_(s),
        hm_(s.height[0] > s.height[1] ? s.height[0] : s.height[1]),
        wm_(s.across[0] > s.across[1] ? s.across[0] : s.across[1]),
        rows_(2 * hm_ - 1),
        row_(2 * wm_ - 1) {
    first_[0] = s.prefix;
    first_[1] = 2 * s.prefix + s.height[0] * s.across[0];
  }

  int64_t tokens() const { return first_[1] + s_.height[1] * s_.across[1]; }
  int64_t columns() const { return 4 * rows_ * row_; }
  // Of one head's laid out table. Whole vectors are read at the end of a run.
  int64_t size() const { return columns() + Simd<T>::kLanes; }

  void lay_out(const T* table, T* laid) const {
    for (int64_t region = 0; region < 4; ++region) {
      for (int64_t offset = 0; offset < rows_; ++offset) {
        T* to = laid + (region * rows_ + offset) * row_;
        const T* from = table + offset * row_ * 4 + region;
        for (int64_t x = 0; x < row_; ++x) to[x] = from[(row_ - 1 - x) * 4];
      }
    }
    for (int64_t x = columns(); x < size(); ++x) laid[x] = 0;
  }

  // The inverse, for the sum that `collect` made.
  void restore(const T* laid, T* table) const {
    for (int64_t region = 0; region < 4; ++region) {
      for (int64_t offset = 0; offset < rows_; ++offset) {
        const T* from = laid + (region * rows_ + offset) * row_;
        T* to = table + offset * row_ * 4 + region;
        for (int64_t x = 0; x < row_; ++x) to[(row_ - 1 - x) * 4] = from[x];
      }
    }
  }

  // bias[token, :] to `row`; up to a vector behind its end is written too.
  void write(const T* laid, int64_t token, T* row) const {
    const Patch patch = find(token);
    if (!patch.found) {
      for (int64_t j = 0; j < tokens(); ++j) row[j] = 0;
      return;
    }
    for (int image = 0; image < 2; ++image) {
      T* to = row + first_[image];
      for (int64_t j = 0; j < s_.prefix; ++j) to[j - s_.prefix] = 0;
      const int64_t across = s_.across[image];
      for (int64_t r = 0; r < s_.height[image]; ++r, to += across) {
        const T* from = laid + run(patch, image, r);
        for (int64_t c = 0; c < across; c += Simd<T>::kLanes) store(to + c, load(from + c));
      }
    }
  }

  // Adds row `token` of a gradient of the bias to the laid out gradient of the table.
  void collect(const T* row, int64_t token, T* laid) const {
    const Patch patch = find(token);
    if (!patch.found) return;
    for (int image = 0; image < 2; ++image) {
      const T* __restrict from = row + first_[image];
      const int64_t across = s_.across[image];
      for (int64_t r = 0; r < s_.height[image]; ++r, from += across) {
        T* __restrict to = laid + run(patch, image, r);
        for (int64_t c = 0; c < across; ++c) to[c] += from[c];
      }
    }
  }

 private:
  struct Patch {
    bool found;
    int image;
    int64_t r, c;
  };

  Patch find(int64_t token) const {
    const int image = token >= first_[1] - s_.prefix;
    const int64_t cell = token - first_[image];
    return {cell >= 0, image, cell / s_.across[image], cell % s_.across[image]};
  }

  // Where the keys (r, all c') of `image` begin.
  int64_t run(const Patch& patch, int image, int64_t r) const {
    return ((2 * patch.image + image) * rows_ + patch.r - r + hm_ - 1) * row_ + wm_ - 1 - patch.c;
  }

  const RegionAttentionShape& s_;
  const int64_t hm_, wm_, rows_, row_;
  int64_t first_[2];  // token of the first patch of each image
};

}  // namespace LPMFLOW_ISA
}  // namespace lpmflow
