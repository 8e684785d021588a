"""The block kernel for TPU, in Pallas."""
