"""Budgets, meters and the slow tier."""
