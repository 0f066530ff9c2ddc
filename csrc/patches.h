// Pixels to the rows that the patch embedding multiplies.
#pragma once

#include <cstdint>

namespace qvlfast {

// Frames are uint8 [frames, height, width, 3], contiguous.
struct PatchShape {
  int64_t frames;
  int64_t height;
  int64_t width;
  int64_t patch;     // side of a patch in pixels
  int64_t temporal;  // frames of a patch; a still (frames == 1) has patches of one frame
  int64_t merge;     // patches on a side of a block

  // Throws std::invalid_argument, naming the value, unless the frames cut into whole patches.
  void check() const;

  int64_t depth() const { return frames == 1 ? 1 : temporal; }
  int64_t rows() const { return frames / depth() * (height / patch) * (width / patch); }  // N
  int64_t row_bytes() const { return 3 * depth() * patch * patch; }                       // K
};

// Writes out [N, K]: each row one patch as (channel, frame, row, column), and the rows in the order
// (time, block row, block column, row in the block, column in the block).
// The shape was checked. Runs on the thread pool.
void extract_patches(const uint8_t* frames, const PatchShape& shape, uint8_t* out);

}  // namespace qvlfast
