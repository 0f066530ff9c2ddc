// Everything that is written once for all instruction sets, each part on top of the one before.
// clang-format off
#include "simd.inl"
#include "rowwise.inl"
#include "gemm.inl"
#include "attention.inl"
// clang-format on
