"""Faces that other libraries know."""
