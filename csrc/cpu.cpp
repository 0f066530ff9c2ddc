#include "cpu.h"

#include <array>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace qvlfast {
namespace {

constexpr std::array<Isa, 4> kAllIsas = {Isa::scalar, Isa::avx2, Isa::avx512, Isa::amx};

#if defined(__x86_64__)

struct CpuidRegisters {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidRegisters cpuid(uint32_t leaf, uint32_t subleaf) {
  CpuidRegisters r;
  // Answers 0, and leaves the registers at 0, for a leaf that the processor does not have.
  if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) {
    return CpuidRegisters{};
  }
  return r;
}

bool bit(uint64_t word, int index) { return ((word >> index) & 1U) != 0; }

// Which register states the operating system saves: Intel SDM volume 1, section 13.3.
uint64_t read_xcr0() {
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux saves the 8 KiB of tiles only for processes that asked: Documentation/arch/x86/xstate.rst.
bool request_amx_permission() {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

CpuFeatures detect() {
  CpuFeatures f;
  const CpuidRegisters leaf1 = cpuid(1, 0);
  const CpuidRegisters leaf7 = cpuid(7, 0);
  const CpuidRegisters leaf7_1 = cpuid(7, 1);
  f.ssse3 = bit(leaf1.ecx, 9);
  f.bmi1 = bit(leaf7.ebx, 3);
  f.bmi2 = bit(leaf7.ebx, 8);

  const bool osxsave = bit(leaf1.ecx, 27);
  const uint64_t xcr0 = osxsave ? read_xcr0() : 0;
  constexpr uint64_t kAvxState = 0x6;       // XMM, YMM
  constexpr uint64_t kAvx512State = 0xE6;   // and opmask, ZMM low and high
  constexpr uint64_t kTileState = 0x60000;  // tile configuration and data
  const bool avx_saved = (xcr0 & kAvxState) == kAvxState;
  const bool avx512_saved = (xcr0 & kAvx512State) == kAvx512State;
  const bool tiles_saved = (xcr0 & kTileState) == kTileState;

  if (avx_saved) {
    f.avx2 = bit(leaf7.ebx, 5);
    f.fma = bit(leaf1.ecx, 12);
    f.f16c = bit(leaf1.ecx, 29);
  }
  if (avx512_saved) {
    f.avx512f = bit(leaf7.ebx, 16);
    f.avx512dq = bit(leaf7.ebx, 17);
    f.avx512bw = bit(leaf7.ebx, 30);
    f.avx512vl = bit(leaf7.ebx, 31);
    f.avx512_vnni = bit(leaf7.ecx, 11);
    f.avx512_bf16 = bit(leaf7_1.eax, 5);
  }
  if (tiles_saved && bit(leaf7.edx, 24) && request_amx_permission()) {
    f.amx_tile = true;
    f.amx_bf16 = bit(leaf7.edx, 22);
    f.amx_int8 = bit(leaf7.edx, 25);
  }
  return f;
}

#elif defined(__aarch64__)

CpuFeatures detect() {
  // Bits of the Linux arm64 hwcap words: Documentation/arch/arm64/elf_hwcaps.rst.
  constexpr unsigned long kHwcapAsimd = 1UL << 1;
  constexpr unsigned long kHwcapAsimdDotProduct = 1UL << 20;
  constexpr unsigned long kHwcap2I8mm = 1UL << 13;
  const unsigned long hwcap = getauxval(AT_HWCAP);
  const unsigned long hwcap2 = getauxval(AT_HWCAP2);
  CpuFeatures f;
  f.neon = (hwcap & kHwcapAsimd) != 0;
  f.dotprod = (hwcap & kHwcapAsimdDotProduct) != 0;
  f.i8mm = (hwcap2 & kHwcap2I8mm) != 0;
  return f;
}

#else

CpuFeatures detect() { return CpuFeatures{}; }

#endif

Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("QVLFAST_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return best;
  }
  for (const Isa candidate : kAllIsas) {
    if (std::string(wanted) != isa_name(candidate)) {
      continue;
    }
    if (candidate > best) {
      throw std::invalid_argument("QVLFAST_ISA=" + std::string(wanted) +
                                  " is more than this processor has; the best here is " +
                                  isa_name(best) + ": unset QVLFAST_ISA or ask for that or less");
    }
    return candidate;
  }
  throw std::invalid_argument("QVLFAST_ISA=" + std::string(wanted) +
                              " is unknown; use scalar, avx2, avx512 or amx");
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

std::vector<std::pair<const char*, bool>> cpu_feature_list() {
  const CpuFeatures& f = cpu_features();
  return {
      {"ssse3", f.ssse3},
      {"avx2", f.avx2},
      {"fma", f.fma},
      {"f16c", f.f16c},
      {"bmi1", f.bmi1},
      {"bmi2", f.bmi2},
      {"avx512f", f.avx512f},
      {"avx512bw", f.avx512bw},
      {"avx512dq", f.avx512dq},
      {"avx512vl", f.avx512vl},
      {"avx512_vnni", f.avx512_vnni},
      {"avx512_bf16", f.avx512_bf16},
      {"amx_tile", f.amx_tile},
      {"amx_int8", f.amx_int8},
      {"amx_bf16", f.amx_bf16},
      {"neon", f.neon},
      {"dotprod", f.dotprod},
      {"i8mm", f.i8mm},
  };
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::amx:
      return "amx";
  }
  throw std::logic_error("this is a bug: an Isa without a name");
}

Isa best_isa() {
#if defined(QVLFAST_EMULATE)
  return Isa::amx;
#else
  const CpuFeatures& f = cpu_features();
  if (!(f.avx2 && f.fma && f.f16c && f.bmi1 && f.bmi2)) {
    return Isa::scalar;
  }
  if (!(f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl && f.avx512_vnni)) {
    return Isa::avx2;
  }
  if (!(f.amx_tile && f.amx_int8 && f.amx_bf16 && f.avx512_bf16)) {
    return Isa::avx512;
  }
  return Isa::amx;
#endif
}

Isa isa() {
  // A throwing initialiser leaves the variable unset, so that a wrong value is reported each time.
  static const Isa chosen = choose_isa();
  return chosen;
}

}  // namespace qvlfast
