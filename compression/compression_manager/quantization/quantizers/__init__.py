"""The modules that quantize one tensor of one layer while the model trains."""
