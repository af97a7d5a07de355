// The digest of a record, taken in chunk by chunk: XXH3, 128 bits, without a seed, of inputs whose
// length is a multiple of 1024 bytes.  See kernels/hash_stripes.h.
#pragma once

#include <cstdint>

#include "kernels/table.h"

namespace fpt {

class Hash {
 public:
  // Of an input of `bytes` in all, a multiple of 1024.
  Hash(const Kernels& kernels, int64_t bytes);

  // The next `bytes` of it, a multiple of 64.
  void update(const uint8_t* data, int64_t bytes);

  // 16 bytes in canonical (big-endian) order, once all of the input was taken in.
  void finish(uint8_t* digest);

 private:
  const Kernels& kernels_;
  int64_t bytes_;
  int64_t stripes_ = 0;
  uint8_t last_[64];
  uint64_t sums_[8];
};

}  // namespace fpt
