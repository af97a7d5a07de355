// Memory that a call works in.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace fpt {

constexpr int64_t LINE = 64;  // bytes of a line of the cache

// `count` elements from the beginning of a line of the cache on, so that no vector or row of a tile lies
// across two.  They hold nothing yet.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : held_(static_cast<T*>(::operator new(count * sizeof(T), ALIGNED))) {}
  T* data() const { return held_.get(); }

 private:
  static constexpr std::align_val_t ALIGNED{LINE};
  struct Free {
    void operator()(T* held) const { ::operator delete(held, ALIGNED); }
  };
  std::unique_ptr<T, Free> held_;
};

}  // namespace fpt
