"""What became of every layer, and what quantizing it costs."""

from compression_manager.report.report import LayerArithmetic, LayerReport, Report

__all__ = ["Report", "LayerReport", "LayerArithmetic"]
