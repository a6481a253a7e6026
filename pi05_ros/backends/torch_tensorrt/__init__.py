"""The way to TensorRT without ONNX: stages as programs of torch.export, compiled to engines by torch_tensorrt."""
