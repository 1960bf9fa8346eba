"""An explicit attention mask for packed rows, for models that do not derive one from position ids."""

from __future__ import annotations

import torch

BLOCK = "trimtab_block_mask"  # set on training arguments: the dtype of the packed rows' explicit mask


def block_mask(positions_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, T, T), added to attention scores: 0 where a token sees one of its document, else the lowest value."""
    document_BT = (positions_BT == 0).cumsum(1)
    sees = (document_BT[:, :, None] == document_BT[:, None, :]).tril_()
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
    return mask[:, None]
