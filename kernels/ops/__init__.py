"""Tensor operations that the speed and the accuracy of an edit hang on (installed as `surgery.kernels`)."""
