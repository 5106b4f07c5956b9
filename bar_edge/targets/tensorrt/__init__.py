"""TensorRT engines and bundles."""
