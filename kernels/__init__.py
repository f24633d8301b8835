"""Triton kernels: installed as negmerge_fast.kernels."""
