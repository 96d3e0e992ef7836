"""Graph passes over onnx_ir models, one a file; each changes the model in place and says whether it did."""
