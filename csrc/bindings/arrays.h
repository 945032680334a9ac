// Arrays of numpy as the bindings take them, and the checks of their shapes.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace tkt {

namespace py = pybind11;

// Arrays are taken as they are (noconvert at every def): a silent copy would hide a wrong dtype or layout.
using Floats = py::array_t<float, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Int32s = py::array_t<int32_t, py::array::c_style>;
using Int64s = py::array_t<int64_t, py::array::c_style>;
using StridedFloats = py::array_t<float, 0>;

inline std::string shape_text(const py::array& array) {
  std::string text = "(";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) text += (i > 0 ? ", " : "") + std::to_string(array.shape(i));
  return text + ")";
}

inline void require_shape(const py::array& array, const char* name, const std::vector<int64_t>& shape) {
  bool equal = array.ndim() == static_cast<py::ssize_t>(shape.size());
  for (size_t i = 0; equal && i < shape.size(); ++i) equal = array.shape(static_cast<py::ssize_t>(i)) == shape[i];
  if (equal) return;
  std::string wanted = "(";
  for (size_t i = 0; i < shape.size(); ++i) wanted += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  throw std::invalid_argument(std::string(name) + " must have shape " + wanted + "), got " + shape_text(array));
}

// The rows of an array (rows, cols).
inline int64_t rows_of(const py::array& array, const char* name, int64_t cols) {
  if (array.ndim() != 2 || array.shape(1) != cols) {
    throw std::invalid_argument(std::string(name) + " must have shape (rows, " + std::to_string(cols) + "), got " +
                                shape_text(array));
  }
  return array.shape(0);
}

// The floats of an array (size,), at least one.
inline int64_t size_of(const py::array& array, const char* name) {
  if (array.ndim() != 1 || array.size() < 1) {
    throw std::invalid_argument(std::string(name) + " must have shape (size,), size at least 1, got " +
                                shape_text(array));
  }
  return array.size();
}

}  // namespace tkt
