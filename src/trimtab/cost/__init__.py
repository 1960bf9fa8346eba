"""The cost of a step: traces of tensors without values, rates of this machine, and process overhead."""
