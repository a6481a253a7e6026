"""TensorRT: every stage as an ONNX graph, its engine, and their runner."""
