"""Loads, inspects and changes transformers' models: anatomy, surgery, fused operations, the loss, generation."""
