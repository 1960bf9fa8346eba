"""Bases for the common kinds of patches: wrapped linears, networks beside the FFNs, KV-cache policies."""
