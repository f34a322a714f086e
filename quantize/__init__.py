"""Block formats of quantized tensors, and (later) the converter."""
