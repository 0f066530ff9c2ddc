// What this processor can do, and which instruction set the kernels use.
#pragma once

#include <utility>
#include <vector>

namespace qvlfast {

// A flag is set only when the operating system saves the registers that go with it.
struct CpuFeatures {
  bool ssse3 = false;
  bool avx2 = false;
  bool fma = false;
  bool f16c = false;
  bool bmi1 = false;
  bool bmi2 = false;
  bool avx512f = false;
  bool avx512bw = false;
  bool avx512dq = false;
  bool avx512vl = false;
  bool avx512_vnni = false;
  bool avx512_bf16 = false;
  bool amx_tile = false;
  bool amx_int8 = false;
  bool amx_bf16 = false;
  bool neon = false;
  bool dotprod = false;
  bool i8mm = false;
};

// Ordered: each includes all before it. Arm has `scalar` alone; its flags are separate.
enum class Isa {
  scalar,
  avx2,    // AVX2, FMA, F16C, BMI1 and BMI2
  avx512,  // F, BW, DQ, VL and VNNI
  amx,     // avx512, tiles with int8 and bf16
};

// Detected once. The first call asks Linux for the permission to use AMX tiles.
const CpuFeatures& cpu_features();

// The same as (name, flag), for bindings and reports.
std::vector<std::pair<const char*, bool>> cpu_feature_list();

const char* isa_name(Isa isa);

// The best instruction set of this processor.
Isa best_isa();

// `best_isa()`, or less where the environment variable QVLFAST_ISA asks for less.
// Throws std::invalid_argument when it names an unknown or an unsupported one.
Isa isa();

}  // namespace qvlfast
