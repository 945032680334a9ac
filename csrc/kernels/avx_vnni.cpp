#include "kernels/avx_vnni-inl.h"

namespace tkt::avx_vnni {
namespace {
#include "kernels/vector_ops-inl.h"
}

#include "kernels/table-inl.h"

}  // namespace tkt::avx_vnni
