"""Generates with, evaluates and exports trained models."""
