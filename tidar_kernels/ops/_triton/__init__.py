"""Triton kernels, one file a family. Importing this package needs Triton; `tidar_kernels` itself does not."""
