// portalm_backends._cuda and ._rocm: the launchers as functions of integers. Addresses come from
// data_ptr(), the stream from torch; the caller keeps the memory alive.
#include <nanobind/nanobind.h>

#include "launchers.h"

#if defined(PORTALM_ROCM)
#include <nanobind/stl/string.h>

#include "../csrc_rocm/device.h"
NB_MODULE(_rocm, m) {
  m.def("load", &portalm::load_code_object);  // before the first launch
#else
NB_MODULE(_cuda, m) {
#endif
  m.def("decode_attention", &portalm::decode_attention);
}
