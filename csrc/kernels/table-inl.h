// The one symbol an ISA file exports. Included last, inside the ISA's namespace; TKT_ISA_NAME and TKT_ISA_FEATURES are
// set by the ISA file.

extern const KernelTable kTable = {
    TKT_ISA_NAME,  TKT_ISA_FEATURES,
    V::kLookAhead, {dot_f32, dot_f16, dot_bf16, dot_q4_0, dot_q5_0, dot_q8_0, dot_q4_k, dot_q5_k, dot_q6_k},
    quantize_q8,   rms_norm,
    swiglu,        exp_minus,
    add_scaled,    score_split,
    sum_split,     merge_split,
};
