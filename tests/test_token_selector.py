"""Selectors and the prefix tree: probabilities by enumeration, unbiased weights, and T-SPMO's three identities."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from trimtab.errors import BadInput
from trimtab.model.prefix_trie import PrefixTrie, pack
from trimtab.model.token_selector import (
    All,
    FirstAndSome,
    Selected,
    TopEntropy,
    TrieBranches,
    UniformK,
    _chances,
    groups_of,
)

MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]).bool()


def every_choice(selector: FirstAndSome):
    """(its probability, the choice) for each outcome of the coins."""
    tokens = MASK.shape[1]
    for bits in itertools.product((False, True), repeat=tokens):
        coins = torch.tensor(bits).expand(len(MASK), tokens)
        heads = sum(bits)
        yield selector.p**heads * (1 - selector.p) ** (tokens - heads), selector.with_coins(MASK, coins)


@pytest.mark.parametrize("alpha,k,p", [(2, 4, 0.3), (0, 2, 0.5), (3, 3, 0.9), (2, 100, 0.25), (9, 9, 0.1)])
def test_inclusion_probabilities_are_those_of_all_outcomes(alpha, k, p):
    selector = FirstAndSome(alpha, k, p)
    share, counted = torch.zeros(MASK.shape, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for chance, found in every_choice(selector):
        share += chance * found.chosen
        counted += chance
        assert (found.chosen.sum(1) <= max(k, alpha)).all() and not (found.chosen & ~MASK).any()
        assert found.chosen[:, :alpha].equal(MASK[:, :alpha]), "the first ones always"
    assert float(counted) == pytest.approx(1.0)
    assert torch.allclose(share.float(), found.probability, atol=1e-6)


@pytest.mark.parametrize("alpha,k,p", [(2, 4, 0.3), (0, 2, 0.5), (2, 100, 0.25)])
def test_the_mean_over_masks_is_the_full_gradient(alpha, k, p):
    """Gradients of sum_t w_t f_t(x), for random f: with unbiased weights the mean is that of all tokens; else not."""
    generator = torch.Generator().manual_seed(alpha + k)
    slopes = torch.randn(*MASK.shape, 5, generator=generator, dtype=torch.float64)
    full = (All().select(MASK).weights()[..., None] * slopes).sum((0, 1))
    means = {}
    for unbiased in (True, False):
        means[unbiased] = sum(
            chance * (found.weights(unbiased)[..., None] * slopes).sum((0, 1))
            for chance, found in every_choice(FirstAndSome(alpha, k, p))
        )
    assert torch.allclose(means[True], full, atol=1e-6)
    assert not torch.allclose(means[False], full, atol=1e-2), "the paper's weights are biased"


def test_uniform_k_is_unbiased_and_takes_all_of_short_ones():
    k, slopes = 2, torch.randn(4, 3, dtype=torch.float64)
    mask = torch.ones(1, 4).bool()
    total = sum(
        (Selected(chosen := torch.tensor([[i in some for i in range(4)]]), torch.full((1, 4), 0.5), mask)
         .weights(True)[0, :, None] * slopes).sum(0) * chosen.any()
        for some in itertools.combinations(range(4), k)
    ) / 6  # fmt: skip
    assert torch.allclose(total, slopes.mean(0), atol=1e-6)
    found = UniformK(k).select(MASK, torch.Generator().manual_seed(0))
    assert found.chosen.sum(1).tolist() == [2, 2, 1] and not (found.chosen & ~MASK).any()
    assert torch.allclose(found.probability[:, 0], torch.tensor([2 / 7, 2 / 4, 1.0]))
    drawn = torch.zeros(MASK.shape)
    for seed in range(2000):
        drawn += UniformK(k).select(MASK, torch.Generator().manual_seed(seed)).chosen
    assert torch.allclose(drawn / 2000, found.probability, atol=0.04)


def test_the_generator_decides():
    select = lambda seed: FirstAndSome(1, 4, 0.5).select(MASK, torch.Generator().manual_seed(seed)).chosen  # noqa: E731
    assert select(1).equal(select(1)) and any(not select(1).equal(select(seed)) for seed in range(2, 12))


def test_the_chances_of_long_completions_fall_after_the_cap():
    chances = _chances(1000, 50, 100, 0.25)
    assert chances[:50].eq(1).all() and chances[50:100].allclose(torch.tensor(0.25)) and chances[-1] < 1e-3
    assert float(chances.sum()) == pytest.approx(100, abs=1e-3), "the cap is reached"


def test_top_entropy():
    entropy = torch.arange(21.0).view(3, 7)
    found = TopEntropy(0.25).select(MASK, entropy=entropy)
    assert found.chosen.nonzero().tolist() == [[1, 2], [1, 3], [2, 0]] and found.chosen.equal(found.probability.bool())
    with pytest.raises(BadInput, match="never chosen"):
        found.weights(unbiased=True)
    assert not TopEntropy().select(torch.zeros(2, 3), entropy=torch.ones(2, 3)).chosen.any()


# --- the tree ---------------------------------------------------------------------------------------------------------


def random_completions(seed: int, end: bool = True):
    """Completions of few words, so that many share prefixes; those that are not cut at the limit end with 9."""
    made = random.Random(seed)
    rows = []
    for _ in range(made.randint(2, 9)):
        size = made.randint(1, 6) if end else 4
        rows.append([made.randint(1, 2) for _ in range(size)] + ([9] if end else []))
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return rows, ids, mask, torch.tensor([made.choice([0.0, 1.0, 0.5]) for _ in rows])


def naive(rows, rewards, prefix):
    """E[R | prefix], by definition."""
    through = [float(r) for row, r in zip(rows, rewards, strict=True) if row[: len(prefix)] == prefix]
    return sum(through) / len(through)


@pytest.mark.parametrize("seed", range(60))
def test_advantages_and_their_identities(seed):
    rows, ids, mask, rewards = random_completions(seed, end=bool(seed % 3))
    trie = PrefixTrie.of(ids, mask)
    found = trie.advantages(rewards)
    children: dict[tuple, set] = {}
    for row in rows:
        for at, token in enumerate(row):
            children.setdefault(tuple(row[:at]), set()).add(token)
    for i, row in enumerate(rows):
        for at in range(len(row)):
            wanted = naive(rows, rewards, row[: at + 1]) - naive(rows, rewards, row[:at])
            assert float(found[i, at]) == pytest.approx(wanted, abs=1e-12)
            if len(children[tuple(row[:at])]) == 1:  # (i) one child: nothing to learn
                assert float(found[i, at]) == 0.0
    for prefix, tokens in children.items():  # (ii) the weighted sum at a node
        through = [row for row in rows if tuple(row[: len(prefix)]) == prefix]
        total = sum(
            sum(row[: len(prefix) + 1] == [*prefix, v] for row in through)
            * (naive(rows, rewards, [*prefix, v]) - naive(rows, rewards, list(prefix)))
            for v in tokens
        )
        assert total == pytest.approx(0.0, abs=1e-12)
    for i, row in enumerate(rows):  # (iii) along a completion
        same = [float(r) for other, r in zip(rows, rewards, strict=True) if other == row]
        assert float(found[i].sum()) == pytest.approx(sum(same) / len(same) - float(rewards.double().mean()), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_each_branch_is_chosen_once(seed):
    rows, ids, mask, _ = random_completions(seed)
    chosen = TrieBranches().select(mask, ids=ids, group=torch.zeros(len(rows))).chosen
    wanted = {}
    for row in rows:
        for at in range(len(row)):
            parts = {tuple(o[at : at + 1]) for o in rows if o[:at] == row[:at]}
            if len(parts) > 1:
                wanted.setdefault(tuple(row[: at + 1]), None)
    found = [tuple(rows[i][: at + 1]) for i, at in chosen.nonzero().tolist()]
    assert sorted(found) == sorted(wanted) and len(set(found)) == len(found)


def test_a_completion_that_ends_early_is_a_branch():
    ids, mask = torch.tensor([[5, 6], [5, 0]]), torch.tensor([[1, 1], [1, 0]])
    trie = PrefixTrie.of(ids, mask)
    assert trie.branches.tolist() == [[False, True], [False, False]]
    assert trie.advantages(torch.tensor([1.0, 0.0])).tolist() == [[0.0, 0.5], [0.0, 0.0]]


def test_groups_stay_apart():
    ids = torch.tensor([[5, 6], [5, 7], [5, 6], [5, 6]])
    group = torch.tensor([1, 0, 1, 0])
    assert [rows.tolist() for rows in groups_of(group)] == [[0, 2], [1, 3]]
    found = TrieBranches().select(torch.ones(4, 2), ids=ids, group=group).chosen
    assert found.tolist() == [[False, False], [False, True], [False, False], [False, True]]


@pytest.mark.parametrize("seed", range(20))
def test_a_packed_tree_has_each_prefix_once(seed):
    made = random.Random(seed)
    rows = random_completions(seed)[0]
    groups = [made.randint(0, 1) for _ in rows]
    weights = [[made.choice([0.0, 0.0, 1.5, -1.0]) for _ in row] for row in rows]
    packed = pack(rows, weights, groups)
    wanted: dict[tuple, float] = {}
    for row, weight, group in zip(rows, weights, groups, strict=True):
        size = max((at + 1 for at, value in enumerate(weight) if value), default=0)
        for at in range(size):
            key = (group, *row[: at + 1])
            wanted[key] = wanted.get(key, 0.0) + weight[at]
    found = {}
    order = [group for group in dict.fromkeys(groups) if any(key[0] == group for key in wanted)]
    for row, group in enumerate(order):
        for at in range(packed.ids.shape[1]):
            sees = packed.sees[row, at].nonzero().squeeze(1)
            if packed.ids[row, at] == 0:
                assert sees.tolist() == [at]
                continue
            assert packed.positions[row, at] == len(sees) - 1
            assert len(sees) == 1 or packed.parents[row, at] == sees[-2]
            found[(group, *packed.ids[row, sees].tolist())] = float(packed.weights[row, at])
    assert found == pytest.approx(wanted)
