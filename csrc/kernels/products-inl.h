// What the files of an ISA export beside its table: the products of each type, which the table lists. Included inside
// the ISA's namespace.

template <WeightType type>
struct Products {
  static void dot(const DotArgs& args);
  static void gemv(const GemvArgs& args);
};
