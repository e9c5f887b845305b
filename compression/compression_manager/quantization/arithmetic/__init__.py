"""The arithmetic of quantization: scales, rounding to integers and back."""
