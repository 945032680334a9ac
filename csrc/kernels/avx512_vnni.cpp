#include "kernels/avx512_vnni-inl.h"

namespace tkt::avx512_vnni {
namespace {
#include "kernels/vector_ops-inl.h"
}

#include "kernels/table-inl.h"

}  // namespace tkt::avx512_vnni
