"""Graph passes over onnx_ir models, one per file; each changes the model in place and returns whether it did."""
