"""The block kernel for NVIDIA GPUs from Ampere on, in Pallas' Triton backend."""
