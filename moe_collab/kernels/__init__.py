"""Kernels for MoE layers of mixed bit-widths; a layer's weights lie in one arena, described by one table."""
