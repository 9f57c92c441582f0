"""Shipping: the student as a file that a device engineer can drop in, checked before it has its name."""

from kdcli.export.onnx import Exported, OnnxModel, export_onnx

__all__ = ["Exported", "OnnxModel", "export_onnx"]
