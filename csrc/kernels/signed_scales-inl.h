// Scales of sub-blocks that are signed bytes, four to a lane.

template <int kCount>
struct SignedScales {
  static constexpr bool kHasMinima = false;
  V::I bytes[kCount / 4];
  V::F d;

  // Of sub-block j, counted from that half of the block.
  template <int j>
  V::I scale(int half = 0) const {
    return V::template shift_right_signed<24>(
        V::template shift_left<24 - 8 * (j % 4)>(bytes[half * (kCount / 8) + j / 4]));
  }
  // Where V::kFoldsScales: the scale twice, as 16 bits.
  template <int j, class Isa = V>
  V::I scale_pair() const {
    return Isa::template signed_byte_pair<j % 4, j % 4, 0>(bytes[j / 4]);
  }
  // Likewise the scales of the two sub-blocks of `block`, times 2^kLog2.
  template <int block, int kLog2, class Isa = V>
  V::I offset_pair() const {
    return Isa::template signed_byte_pair<block % 2 * 2, block % 2 * 2 + 1, kLog2>(bytes[block / 2]);
  }
};

// Bytes below 64, minus 32.
TKT_INLINE V::I minus_32(V::I bytes) {
  return V::xor_i(V::add_i(bytes, V::set_i(0x60606060)), V::set_i(static_cast<int32_t>(0x80808080u)));
}
