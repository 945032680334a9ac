// The table of an ISA. Included last, inside the ISA's namespace; TKT_ISA_NAME and TKT_ISA_FEATURES are set by its
// header.

#include "kernels/products-inl.h"

#define TKT_DOT(name) Products<WeightType::k##name>::dot,
#define TKT_GEMV(name) Products<WeightType::k##name>::gemv,
extern const KernelTable kTable = {
    TKT_ISA_NAME,
    TKT_ISA_FEATURES,
    {TKT_WEIGHT_TYPES(TKT_DOT)},
    {TKT_WEIGHT_TYPES(TKT_GEMV)},
    quantize_q8,
    rms_norm,
    swiglu,
    exp_minus,
    add_scaled,
    score_split,
    sum_split,
    merge_split,
};
