"""The block kernel for Hopper GPUs, in Pallas' Mosaic backend."""
