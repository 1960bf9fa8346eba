"""What a step will cost: tensors traced without values, rates measured on this machine, and process overhead."""
