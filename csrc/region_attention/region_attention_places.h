// Where the bias of two tokens lies in its table; for host and device, to be tested without a GPU.
#pragma once

#include "../common/hostdevice.h"
#include "region_attention.h"

namespace lpmflow {

// A token has a place as a query and one as a key, at least 0, and their difference is the column of the table; -1 where
// it is a prefix token and has no bias.
struct RegionPlaces {
  int prefix, source, target;  // tokens before the patches of an image, patches of the two
  int source_across, target_across;
  int hm, wm;

  LPMFLOW_HOST_DEVICE explicit RegionPlaces(const RegionAttentionShape& s)
      : prefix(static_cast<int>(s.prefix)),
        source(static_cast<int>(s.height[0] * s.across[0])),
        target(static_cast<int>(s.height[1] * s.across[1])),
        source_across(static_cast<int>(s.across[0])),
        target_across(static_cast<int>(s.across[1])),
        hm(static_cast<int>(s.height[0] > s.height[1] ? s.height[0] : s.height[1])),
        wm(static_cast<int>(s.across[0] > s.across[1] ? s.across[0] : s.across[1])) {}

  LPMFLOW_HOST_DEVICE int tokens() const { return 2 * prefix + source + target; }
  LPMFLOW_HOST_DEVICE int query(int token) const {
    const Patch at = patch(token);
    return at.cell < 0 ? -1 : ((at.r + hm - 1) * (2 * wm - 1) + at.c + wm - 1) * 4 + 2 * at.image + 1;
  }
  LPMFLOW_HOST_DEVICE int key(int token) const {
    const Patch at = patch(token);
    return at.cell < 0 ? -1 : (at.r * (2 * wm - 1) + at.c) * 4 + 1 - at.image;
  }

 private:
  struct Patch {
    int image, cell, r, c;  // cell is negative for a prefix token
  };
  LPMFLOW_HOST_DEVICE Patch patch(int token) const {
    const bool second = token >= prefix + source;
    const int cell = token - prefix - (second ? prefix + source : 0), across = second ? target_across : source_across;
    return {second ? 1 : 0, cell, cell / across, cell % across};
  }
};

}  // namespace lpmflow
