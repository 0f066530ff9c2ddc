#include "kernels.h"

#include <stdexcept>
#include <string>

namespace qvlfast {

const Kernels& kernels(Isa isa) {
  if (isa > best_isa()) {
    throw std::invalid_argument(std::string("this processor has no ") + isa_name(isa) +
                                "; the best here is " + isa_name(best_isa()));
  }
#if defined(__x86_64__)
  switch (isa) {
    case Isa::avx2:
      return avx2_kernels();
    case Isa::avx512:
      return avx512_kernels();
    case Isa::amx:
      return amx_kernels();
    case Isa::scalar:
      break;
  }
#endif
  return portable_kernels();
}

}  // namespace qvlfast
