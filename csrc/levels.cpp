#include "levels.h"

#include <torch/headeronly/util/Exception.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fpt {

#if defined(__x86_64__)
namespace amx {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace portable {
extern const Kernels kernels;
}

namespace {

struct Level {
  const char* name;
  bool (*runs)();
  const Kernels* kernels;
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Linux gives a process the tile registers only if it asks (arch/x86: ARCH_REQ_XCOMP_PERM).
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;
  static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return granted;
#else
  return false;
#endif
}

// CPUID leaf 7, EDX: bit 24 tile registers, bit 22 their bf16 products.  __builtin_cpu_supports
// knows neither before GCC 14.
bool has_amx() {
  unsigned a, b, c, d;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d >> 24 & 1) && (d >> 22 & 1) && may_use_tiles();
}
#endif

bool always() { return true; }

// The best first.
const Level all_levels[] = {
#if defined(__x86_64__)
    {"amx", has_amx, &amx::kernels},
    {"avx512_bf16", has_avx512_bf16, &avx512_bf16::kernels},
    {"avx512", has_avx512, &avx512::kernels},
    {"avx2", has_avx2, &avx2::kernels},
#endif
    {"portable", always, &portable::kernels},
};

const Kernels& best() {
  for (const Level& level : all_levels)
    if (level.runs()) return *level.kernels;
  return portable::kernels;
}

}  // namespace

const Kernels& kernels_for(const std::string& name) {
  static const Kernels& chosen = best();
  if (name.empty()) return chosen;
  for (const Level& level : all_levels)
    if (name == level.name && level.runs()) return *level.kernels;
  STD_TORCH_CHECK(
      false, "FPT_NATIVE_LEVEL must be one of ", levels(), " on this processor, got ", name);
}

std::string levels() {
  std::string names;
  for (const Level& level : all_levels)
    if (level.runs()) names += (names.empty() ? "" : ", ") + std::string(level.name);
  return names;
}

}  // namespace fpt
