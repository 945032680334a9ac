// The one symbol an ISA file exports. Included last, inside the ISA's namespace; TKT_ISA_NAME and TKT_ISA_FEATURES are
// set by the ISA file.

extern const KernelTable kTable = {
    TKT_ISA_NAME,
    TKT_ISA_FEATURES,
    {dot<F32Words>, dot<F16Words>, dot<BF16Words>, dot<Q4_0Words>, dot<Q5_0Words>, dot<Q8_0Words>, dot<Q4_KWords>,
     dot<Q5_KWords>, dot<Q6_KWords>},
    {gemv<F32Words>, gemv<F16Words>, gemv<BF16Words>, gemv<Q4_0Words>, gemv<Q5_0Words>, gemv<Q8_0Words>,
     gemv<Q4_KWords>, gemv<Q5_KWords>, gemv<Q6_KWords>},
    quantize_q8,
    rms_norm,
    swiglu,
    exp_minus,
    add_scaled,
    score_split,
    sum_split,
    merge_split,
};
