"""The table in two tiers, and Adam on its rows: against plain tensors and torch.optim."""

from __future__ import annotations

import errno
import mmap
import os
import random

import pytest
import torch

from trimtab.errors import BadInput, DoesNotFit
from trimtab.memory.meter import process_memory
from trimtab.tiered import adam_state, mapped_file
from trimtab.tiered.adam import Rates, RowAdam
from trimtab.tiered.planned import PlannedStore
from trimtab.tiered.record import BLOCK, SCALES
from trimtab.tiered.store import GRADS, VALUES, M, TieredStore, V
from world import SHAPE, store

BACKINGS = {
    "ram": {},
    "file": {"slow": "disk"},
    "file, hot rows": {"slow": "disk", "slots": 4},
    "ram, all hot": {"slots": 99},
}
backings = pytest.mark.parametrize("fields", BACKINGS.values(), ids=BACKINGS)


@backings
def test_what_is_fetched_is_what_the_table_holds(fields):
    """A miss is slower and never wrong: also with fewer slots than rows asked for."""
    made = store(**fields)
    plain = made.whole().clone()
    choose = random.Random(0)
    for step in range(60):
        rows = choose.sample(range(12), choose.randint(1, 9))
        for row, held in zip(rows, made.fetch(rows), strict=True):
            assert torch.equal(held, plain[row])
        written = choose.choice(rows)
        made.part(VALUES, written).fill_(step)
        plain[written] = step
        made.changed([written])
    assert torch.equal(made.whole(), plain)
    asked = made.traffic.hits + made.traffic.misses
    assert made.traffic.up == made.traffic.misses * 3 * 10 * 4 and asked > 60
    assert (made.traffic.hits > 0) == ("slots" in fields)


@backings
@pytest.mark.parametrize("many", [1, 2, 9])
def test_views_of_a_part_are_the_same_of_few_rows_and_of_many(fields, many):
    made = store(**fields)
    plain, numbers = made.whole().clone(), random.Random(many).sample(range(12), many)
    rows = made.fetch(numbers)
    turned = rows.views(lambda row: row[..., 4:].mT)
    assert len(rows) == len(turned) == many and len(list(rows)) == many
    for at, number in enumerate(numbers):
        assert torch.equal(turned[at], plain[number, :, 4:].T) and torch.equal(rows[at], plain[number])
        assert turned[at].untyped_storage().data_ptr() == made.part(VALUES, number).untyped_storage().data_ptr()
    some = numbers[::-2]
    assert all(torch.equal(row, plain[number]) for row, number in zip(rows.of(some), some, strict=True))


@backings
def test_gradients_add_up_until_the_step(fields):
    made = store(**fields)
    plain, choose = torch.zeros(12, *SHAPE), random.Random(1)
    for _ in range(20):
        rows = choose.sample(range(12), 5)
        made.fetch(rows)
        grads = torch.randn(5, *SHAPE)
        made.accumulate(rows, grads)
        plain.index_add_(0, torch.tensor(rows), grads)
    assert set(made.pending()) == set(plain.flatten(1).any(1).nonzero().flatten().tolist())
    for row in made.pending():
        assert torch.allclose(made.part(GRADS, row), plain[row], atol=1e-6)
    assert made.grad_norm_squared() == pytest.approx(float(plain.square().sum()), rel=1e-5)
    made.stepped()
    assert not made.pending() and made.grad_norm_squared() == 0
    made.accumulate([3], [torch.ones(SHAPE)])
    assert torch.equal(made.part(GRADS, 3), torch.ones(SHAPE)), "what was there before the step is gone"


def test_slots_go_to_the_newest_rows_and_are_written_back():
    made = store(slots=2)
    made.fetch([0, 1])
    made.fetch([0, 2])  # 1 is the oldest
    assert (made.traffic.hits, made.traffic.misses, made.traffic.down) == (1, 3, 0)
    made.part(VALUES, 0).zero_()
    made.changed([0])
    made.fetch([3, 4])
    assert made.traffic.down == made.record_bytes, "only the row that was written to"
    assert not made._table[0][: 3 * 10 * 4].any()


def test_dirty_rows_are_those_changed_since_the_last_look():
    made = store()
    made.clean()
    made.accumulate([5, 2], [torch.ones(SHAPE)] * 2)
    assert made.dirty_rows() == []
    RowAdam(made).step(Rates(0.1))
    assert made.dirty_rows() == [2, 5]
    made.clean()
    assert made.dirty_rows() == []


def test_parts_lie_on_pages_of_their_own_and_bytes_are_counted():
    made = TieredStore("table", 5, (8, 1152), slow="disk")
    assert [part.offset for part in made.parts.values()] == [0, 36864, 73728, 110592]
    assert made.nbytes == {"fast": 0, "slow": 5 * 4 * 36864}
    assert TieredStore("table", 5, (8, 1152), slow="ram").nbytes == {"fast": 5 * 4 * 36864, "slow": 0}
    assert TieredStore("table", 5, (7, 10), moments=torch.bfloat16).parts[V].nbytes == 140
    assert list(TieredStore("read only", 5, (7, 10), moments=None).parts) == [VALUES]
    coded = TieredStore("table", 5, (8, 1152), slow="disk", moments=torch.int8)
    assert [part.nbytes for part in coded.parts.values()] == [36864, 9216, 9216, 36864, 4 * 36, 4 * 36]
    assert [part.offset for part in coded.parts.values()] == [0, 36864, 49152, 61440, 98304, 98304 + 192]
    assert coded.nbytes == {"fast": 0, "slow": 5 * (98304 + 4096)}, "parts of a page and more begin on one"


def test_reading_and_stepping_a_file_takes_hardly_any_anonymous_memory(tmp_path):
    grad = torch.ones(64, 1024)

    def work(made):
        for row in range(made.rows):
            made.fetch([row])[0].sum()
            made.accumulate([row], [grad])
        RowAdam(made).step(Rates(0.1))

    work(TieredStore("first", 8, (64, 1024), slow="disk", folder=str(tmp_path)))  # what libraries load when first used
    made = TieredStore("table", 64, (64, 1024), slow="disk", folder=str(tmp_path))
    before = process_memory()
    work(made)
    after, optimizer = process_memory(), made.optimizer
    assert made.nbytes["slow"] == 64 * 4 * 2**18
    assert after["anon"] - before["anon"] < optimizer.temporaries + 8 * 2**20, "copies of a few rows at a time"
    assert after["file"] - before["file"] > 48 * 2**20
    assert not list(tmp_path.iterdir()), "the file has no name: a killed run leaves nothing behind"


@pytest.mark.parametrize(("shape", "asked"), [((4, 16), [768]), (SHAPE, [120, 120, 120])])  # SHAPE: gaps of 8 bytes
def test_parts_without_a_gap_are_written_at_once_and_to_the_end(shape, asked, tmp_path, monkeypatch):
    sizes, pwritev = [], os.pwritev

    def half(descriptor, pieces, offset):
        """A file system that takes less than it is given."""
        sizes.append(sum(map(len, pieces)))
        return pwritev(descriptor, [b"".join(pieces)[: -(-sizes[-1] // 2)]], offset)

    made = TieredStore("table", 3, shape, slow="disk", folder=str(tmp_path))
    given = {kind: torch.randn(2, *shape) for kind in (VALUES, M, V)}
    made.put(GRADS, [2, 0], torch.ones(2, *shape))
    monkeypatch.setattr(os, "pwritev", half)
    made.write([2, 0], given)
    assert [size for size in sizes if size in asked] == asked * 2, "a row at a time"
    for kind, wanted in given.items():
        assert torch.equal(made.gather(kind, [2, 0]), wanted)
        assert not made.part(kind, 1).any()
    assert made.gather(GRADS, [2, 0]).eq(1).all()


def test_a_disk_without_room_refuses_before_the_start(tmp_path):
    free = os.statvfs(tmp_path)
    rows = 2 * free.f_bavail * free.f_frsize // (4 * 2**22)
    with pytest.raises(DoesNotFit, match=r"GiB for table in .*: no space left") as error:
        TieredStore("table", rows, (1024, 1024), slow="disk", folder=str(tmp_path))
    assert error.value.exit_code == 3
    with pytest.raises(DoesNotFit, match=r"GiB for 3 tables of .* are free there"):
        TieredStore("table", rows // 4, (1024, 1024), slow="disk", folder=str(tmp_path), more=2)
    with pytest.raises(BadInput, match="No such file"):
        TieredStore("table", 4, SHAPE, slow="disk", folder=str(tmp_path / "nowhere"))
    assert not list(tmp_path.iterdir())


def refusing(number: int):
    def call(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return call


def test_where_no_space_can_be_reserved_zeros_are_written(tmp_path, monkeypatch):
    plain = TieredStore("table", 20, (64, 64), slow="disk", folder=str(tmp_path))
    for allocate in (refusing(errno.EOPNOTSUPP), None):
        with monkeypatch.context() as patched:
            patched.setattr(mapped_file, "ZEROS", 10_000)
            patched.setattr(os, "posix_fallocate", allocate) if allocate else patched.delattr(os, "posix_fallocate")
            made = TieredStore("table", 20, (64, 64), slow="disk", folder=str(tmp_path))
        assert torch.equal(made._table, plain._table) and len(made._file.map) == len(plain._file.map)


def test_a_file_system_that_maps_no_files_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(mmap, "mmap", refusing(errno.ENODEV))
    with pytest.raises(BadInput, match="its file system does not map files"):
        TieredStore("table", 4, SHAPE, slow="disk", folder=str(tmp_path))


def test_whether_a_folder_is_in_ram(tmp_path):
    mounts = [line.partition(" - ") for line in open("/proc/self/mountinfo")]
    tmpfs = [first.split()[4] for first, _, last in mounts if last.split()[0] == "tmpfs"]
    seen = [point for point in tmpfs if os.path.isdir(point) and os.path.ismount(point)]
    assert seen and all(mapped_file.in_ram(f"{point}/not/made/yet") for point in seen)
    assert not mapped_file.in_ram("/proc")


def test_tables_in_ram_must_find_room_there(monkeypatch):
    size = TieredStore("one", 1, SHAPE).record_bytes
    monkeypatch.setattr(mapped_file, "available_memory", lambda: 12 * size)
    TieredStore("table", 4, SHAPE, more=2), TieredStore("table", 99, SHAPE, slow="disk")
    with pytest.raises(DoesNotFit, match="of RAM for 3 tables of 5 rows: .* are free"):
        TieredStore("table", 5, SHAPE, more=2)
    monkeypatch.setattr(mapped_file, "available_memory", lambda: None)  # a system that does not tell
    TieredStore("table", 5, SHAPE, more=2)


def test_a_planned_store_has_shapes_and_no_memory():
    made = PlannedStore("table", 10**9, (64, 1024))
    assert made.fetch([5])[0].shape == (64, 1024) and made.whole().shape == (10**9, 64, 1024)
    made.accumulate([5], [torch.ones(64, 1024)])
    assert made.pending() == []


# --- Adam -----------------------------------------------------------------------------------------------------------

OPTIMIZERS = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}


def touched(steps: int, share: float, seed: int = 0) -> list[list[int]]:
    """Which rows get a gradient in each step: few, some never, one after a long silence."""
    choose = random.Random(seed)
    chosen = [[row for row in range(1, 11) if choose.random() < share] for _ in range(steps)]
    chosen[0].append(0)
    chosen[-1].append(0)
    return chosen


@backings
@pytest.mark.parametrize("name,decay,steps,share", [
    ("Adam", 0.0, 40, 0.3), ("AdamW", 0.1, 40, 0.3), ("Adam", 0.0, 400, 0.02), ("AdamW", 0.1, 400, 0.02),
    # not for long: this decay drives silent rows to 0, where dense Adam in fp32 itself is 1e-5 from Adam in fp64
    ("Adam", 0.1, 40, 0.3),
])  # fmt: skip
def test_exact_rows_equal_dense_adam(fields, name, decay, steps, share):
    made = store(**fields)
    plain = made.whole().clone().requires_grad_()
    dense = OPTIMIZERS[name]([plain], lr=1.0, betas=(0.9, 0.99), weight_decay=decay)
    rows = RowAdam(made, "exact")
    for step, chosen in enumerate(touched(steps, share)):
        for group in dense.param_groups:
            group["lr"] = 0.01 * (1 + step % 7)  # a schedule
        read = made.fetch(chosen) if chosen else []
        for row, held in zip(chosen, read, strict=True):
            assert torch.allclose(held, plain[row], atol=2e-6), "a row is what dense Adam made of it when it is read"
        plain.grad = torch.zeros_like(plain)
        for row in chosen:
            plain.grad[row] = torch.randn(SHAPE) * 10.0 ** (row - 8)
        made.accumulate(chosen, [plain.grad[row] for row in chosen])
        rows.step(Rates.of(dense, plain))
        dense.step()
    rows.catch_up()
    assert torch.allclose(made.whole(), plain, atol=2e-6)
    assert torch.allclose(made.whole(M), dense.state[plain]["exp_avg"], atol=1e-6)


@backings
def test_lazy_rows_equal_sparse_adam(fields):
    made = store(**fields)
    plain = torch.nn.Embedding(12, 30, sparse=True)
    with torch.no_grad():
        plain.weight.copy_(made.whole().flatten(1))
    sparse = torch.optim.SparseAdam(plain.parameters(), lr=0.05)
    rows = RowAdam(made)
    for chosen in touched(40, 0.3):
        grad = torch.randn(12, *SHAPE)
        (plain(torch.tensor(chosen, dtype=torch.int64)) * grad[chosen].flatten(1)).sum().backward()
        made.accumulate(chosen, [grad[row] for row in chosen])
        rows.step(Rates(0.05))
        sparse.step()
        sparse.zero_grad()
    assert torch.allclose(made.whole().flatten(1), plain.weight, atol=1e-5)


def test_lazy_rows_without_a_gradient_stay():
    made = store()
    rows, before = RowAdam(made), made.whole().clone()
    for _ in range(5):
        made.accumulate([4], [torch.ones(SHAPE)])
        rows.step(Rates(0.1, weight_decay=0.1))
    same = (made.whole() == before).flatten(1).all(1)
    assert same.nonzero().flatten().tolist() == [row for row in range(12) if row != 4]


@pytest.mark.parametrize("bits,off", [(torch.bfloat16, 0.02), (torch.int8, 0.03)], ids=str)
@pytest.mark.parametrize("mode", ["lazy", "exact"])
def test_moments_in_fewer_bits_are_near_those_in_fp32(bits, off, mode):
    ends = []
    for kept in (torch.float32, bits):
        made = TieredStore("table", 12, (9, 100), moments=kept)  # blocks of 256 and a rest
        made.whole().normal_(generator=torch.Generator().manual_seed(0))
        rows, noise, start = RowAdam(made, mode), torch.Generator().manual_seed(5), made.whole().clone()
        size = torch.logspace(-6, 0, 900).view(9, 100)  # gradients of six decades in one row
        for chosen in touched(30, 0.7):
            grads = torch.randn(len(chosen), 9, 100, generator=noise) + 0.5
            made.fetch(chosen)
            made.accumulate(chosen, list(grads * size))
            rows.step(Rates(0.01))
        rows.catch_up()
        ends.append(made.whole().clone())
    moved = (ends[0] - start).norm()
    assert 0 < (ends[0] - ends[1]).norm() < off * moved
    assert (ends[0] - ends[1]).abs().max() < 0.2 * (ends[0] - start).abs().max(), "no number runs away"


def test_moments_in_8_bits_are_codes_with_a_scale_for_each_block():
    made = TieredStore("table", 3, (3, 100), moments=torch.int8)
    rows, grad = RowAdam(made), torch.randn(3, 100)
    grad[0, 0] = 1e-12
    assert not adam_state.read(made, M, 1).any() and not adam_state.read(made, V, 1).any(), "of a row that is new"
    made.accumulate([1], [grad])
    rows.step(Rates(0.01))
    assert made.part(M, 1).dtype == torch.uint8 and made.part(SCALES[M], 1).shape == (2,) and BLOCK == 256
    assert torch.allclose(made.part(SCALES[M], 1)[1], 0.1 * grad.flatten()[256:].abs().max())
    assert torch.allclose(adam_state.read(made, M, 1), 0.1 * grad, atol=0.02 * 0.1 * float(grad.abs().max()))
    root, held = (0.001**0.5 * grad).abs(), adam_state.read(made, V, 1).sqrt()
    assert torch.allclose(held, root, atol=0.01 * float(root.max())) and held.all(), "a step divides by it"


def test_the_clipping_factor_reaches_the_rows():
    ends = []
    for factor in (1.0, 0.25):
        made = store()
        rows = RowAdam(made)
        for scale in (1.0, 8.0):
            made.accumulate([2], [torch.full(SHAPE, scale / factor)])
            made.scale_grads(factor)
            rows.step(Rates(0.01))
        ends.append(made.whole().clone())
    assert torch.allclose(*ends) and made.grad_scale == 1.0


def test_an_unknown_mode_is_refused():
    with pytest.raises(BadInput):
        RowAdam(store(), "fast")
