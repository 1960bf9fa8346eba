"""What one of several processes does in test_shared_rows.py; `python helpers_ranks.py JOBS FOLDER` under torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conftest import MODELS
from trimtab import Recipe
from trimtab.contracts import Place
from trimtab.errors import BadInput
from trimtab.methods.meft import Meft
from trimtab.tiered.store import M, V

STEPS, MICRO, ROWS = 5, 2, 4  # steps, micro-batches of a step, rows of a micro-batch over all processes
FIELDS = {
    "gate": {"slow": "disk", "fields": {}},
    "centroid": {"slow": "ram", "fields": {"router": "centroid", "balance": 0.02, "revive": 2}},
    "two hosts": {"slow": "disk", "fields": {}, "hosts": 2},
}
REFUSED = {"cache": {"cache": 1.0}, "exact": {"adam": "exact"}, "folder": {}}


def loop(name: str, folder: Path) -> dict[str, Any]:
    """A plain loop on a patched model, in each process on its share of the batch; -> what is left."""
    case, (rank, size) = FIELDS[name], (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = MODELS["llama"]().train()
    surgery = Meft(r=64, k=16, probes=2, scale=1.0, **case["fields"]).apply(
        model, Place(fast="cpu", slow=case["slow"], folder=str(folder))
    )
    mapped = "trimtab-rows" in Path("/proc/self/maps").read_text()
    parallel = torch.nn.parallel.DistributedDataParallel(model) if size > 1 else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-6, weight_decay=0.01)
    random, losses = torch.Generator().manual_seed(7), []
    ids_MRT = torch.randint(3, 128, (MICRO, ROWS, 10), generator=random)
    for step in range(STEPS):
        for micro in range(MICRO):
            mine = ids_MRT[micro, rank * ROWS // size : (rank + 1) * ROWS // size]
            last = micro == MICRO - 1
            with contextlib.nullcontext() if last or size == 1 else parallel.no_sync():
                loss = parallel(input_ids=mine, labels=mine).loss / MICRO
                loss.backward()
            losses.append(loss.item())
        if step == 1:
            optimizer.zero_grad()  # a step that is not made
            continue
        optimizer.step()
        optimizer.zero_grad()
    left = {key: tensor.detach().clone() for key, tensor in surgery.own_tensors().items()}
    for number, store in enumerate(surgery.stores):
        left |= {f"{number}.{kind}": store.whole(kind).float().clone() for kind in (M, V)}
        left |= {f"{number}.{key}": tensor.clone() for key, tensor in store.optimizer.state().items()}
        left[f"{number}.dirty"] = torch.tensor(store.dirty_rows())
    bytes_of = surgery.stores[0].nbytes
    files = [str(path) for path in folder.iterdir()]
    surgery.revert()
    del store
    freed = "trimtab-rows" not in Path("/proc/self/maps").read_text()
    return {"left": left, "losses": losses, "mapped": mapped, "freed": freed, "files": files, "bytes": bytes_of}


def refusals() -> dict[str, str]:
    said = {}
    for name, fields in REFUSED.items():
        try:
            folder = None if fields else "/no/such/folder"
            Meft(r=64, **fields).apply(MODELS["llama"](), Place(fast="cpu", folder=folder))
        except BadInput as error:
            said[name] = str(error)
    return said


def in_a_rank(jobs: list[dict[str, Any]], folder: Path) -> None:
    for keys in jobs:
        Recipe.from_dict(keys).train()
    rank = dist.get_rank()
    (folder / f"refused-{rank}.json").write_text(json.dumps(refusals()))
    (folder / "rows").mkdir(exist_ok=True)
    dist.barrier()
    for name, case in FIELDS.items():
        if case.get("hosts"):  # each process takes itself for a host's only one
            os.environ.update(LOCAL_WORLD_SIZE="1", LOCAL_RANK="0")
        torch.save(loop(name, folder / "rows"), folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    in_a_rank(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
