"""An ONNX model cut as ONNX: head and tail are pieces of the user's own graph, run by ONNX Runtime on both sides."""
