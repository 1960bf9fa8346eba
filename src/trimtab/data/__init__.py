"""Data files: read, checked, tokenised and ordered."""
