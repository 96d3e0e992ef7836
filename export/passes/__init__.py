"""Graph passes over onnx_ir models, one per file; each changes the model in place and returns whether it did.

`export.graph.finalize_graph` calls them in order, before `opset.set_opset` on the opset of the trace. To add one: a
file here, its call there, and two tests in tests/export/test_passes.py: this changes, this stays. A change that
TensorRT alone needs goes to `runtime.build.prepare_graph`.
"""
