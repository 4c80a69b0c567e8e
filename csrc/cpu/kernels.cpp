#include "cpu/kernels.h"

#include <cstdlib>
#include <string_view>

#include "base/check.h"

#if defined(ENGINE_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace engine {
namespace {

#if defined(ENGINE_X86)

// The register files that the operating system saves on a context switch (XCR0); 0 when it cannot say.
uint64_t saved_state() {
  unsigned a, b, c, d;
  constexpr unsigned osxsave = 1u << 27;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & osxsave)) return 0;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool saves(uint64_t mask) {
  return (saved_state() & mask) == mask;
}

// Bits of CPUID leaf 1 (ECX) and leaf 7 (EBX, ECX and EDX); Intel SDM volume 2A, CPUID.
bool has_features(unsigned leaf1_ecx, unsigned leaf7_ebx, unsigned leaf7_ecx = 0, unsigned leaf7_edx = 0) {
  unsigned a, b, c, d, b7, c7, d7;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return false;
  return (c & leaf1_ecx) == leaf1_ecx && (b7 & leaf7_ebx) == leaf7_ebx && (c7 & leaf7_ecx) == leaf7_ecx &&
         (d7 & leaf7_edx) == leaf7_edx;
}

bool runs_avx2() {
  constexpr unsigned fma_avx_f16c = 1u << 12 | 1u << 28 | 1u << 29, avx2 = 1u << 5;
  constexpr uint64_t xmm_ymm = 0x6;
  return has_features(fma_avx_f16c, avx2) && saves(xmm_ymm);
}

bool runs_avx512() {
  constexpr unsigned f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
  constexpr uint64_t opmask_zmm = 0xe0;
  return runs_avx2() && has_features(0, f_dq_bw_vl) && saves(opmask_zmm);
}

bool runs_avx512vnni() {
  constexpr unsigned vnni = 1u << 11;
  return runs_avx512() && has_features(0, 0, vnni);
}

bool runs_avx512bf16() {
  constexpr unsigned bf16 = 1u << 5;
  unsigned a, b, c, d;
  return runs_avx512vnni() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bf16) != 0;
}

// AMD's take a pair of bf16 numbers in the time of one f32 (Zen 4: 118 against 59 GMAC/s a core), Intel's in
// that of four (Sapphire Rapids: 40 against 80). A rule rather than a measurement: results depend on it.
bool multiplies_bf16_fast() {
  unsigned a, b, c, d;
  return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx;
}

// Linux gives the tiles' 8 KiB of state to a process that asks, for all its threads; it may refuse, as when a
// thread's signal stack has no room for them (Documentation/arch/x86/xstate.rst).
bool runs_amx() {
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25;
  constexpr uint64_t config_and_data = uint64_t{3} << 17;
  if (!runs_avx512vnni() || !has_features(0, 0, 0, bf16 | tile | int8) || !saves(config_and_data))
    return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

#endif

}  // namespace

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> supported;
#if defined(ENGINE_X86)
  if (runs_amx()) supported.push_back(&kAmxKernels);
  const bool bf16 = runs_avx512bf16(), fast = bf16 && multiplies_bf16_fast();
  if (fast) supported.push_back(&kAvx512Bf16Kernels);
  if (runs_avx512vnni()) supported.push_back(&kAvx512VnniKernels);
  if (bf16 && !fast) supported.push_back(&kAvx512Bf16Kernels);
  if (runs_avx512()) supported.push_back(&kAvx512Kernels);
  if (runs_avx2()) supported.push_back(&kAvx2Kernels);
#endif
  supported.push_back(&kScalarKernels);
  return supported;
}

const Kernels& select_kernels() {
  const auto supported = supported_kernels();
  const char* forced = std::getenv("LANGCHAIN_VLLM_ISA");
  if (!forced || !*forced) return *supported.front();
  std::string names;
  for (const Kernels* kernels : supported) {
    if (std::string_view(forced) == kernels->name) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw InputError("LANGCHAIN_VLLM_ISA is \"" + std::string(forced) + "\", but what can run here is " +
                   names);
}

}  // namespace engine
