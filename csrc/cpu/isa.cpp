// Picks the kernel table once a process: the highest instruction set that this processor has.
//
// Invariant: the choice changes speed and never a bit. TSAM_ISA=baseline, avx2 or avx512 in the environment lowers it
// (a set that the processor lacks is not taken).
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace tsam {

namespace baseline {
extern const cpu::Kernels kernel_table;
}
#ifdef TSAM_HAVE_X86_ISA
namespace avx2 {
extern const cpu::Kernels kernel_table;
}
namespace avx512 {
extern const cpu::Kernels kernel_table;
}
#endif

namespace cpu {
namespace {

const Kernels& choose() {
#ifdef TSAM_HAVE_X86_ISA
  const char* wanted = std::getenv("TSAM_ISA");
  const bool any = wanted == nullptr;
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const bool at_most_avx2 = !any && std::strcmp(wanted, "avx2") == 0;
  const bool at_most_baseline = !any && std::strcmp(wanted, "baseline") == 0;
  if (has_avx512 && !at_most_avx2 && !at_most_baseline) return avx512::kernel_table;
  if (has_avx2 && !at_most_baseline) return avx2::kernel_table;
#endif
  return baseline::kernel_table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& table = choose();
  return table;
}

const char* isa_name() { return kernels().isa; }

}  // namespace cpu
}  // namespace tsam
