"""Token trees: who sees whom, by the kernels too; what of a tree enters the cache; and decoding with them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.paths import KERNELS
from tests.toys import CONFIG, PROMPTS, certain, chain_law, decode_chain, distance, sharp_model, toy
from tidar_kernels import Decoder, KVCache, eager, ops, patterns, testing
from tidar_kernels.decoding.exact import exact_rows
from tidar_kernels.decoding.session import StepConfig
from tidar_kernels.decoding.strategies import Batch, SelfSpeculation, StepResult, Tree, tree
from tidar_kernels.models import Transformer
from tidar_kernels.nn.attention import TiDARAttention
from tidar_kernels.nn.rotary import RotaryEmbedding
from tidar_kernels.ops.verify import SamplingParams
from tidar_kernels.patterns.pattern import Pattern
from tidar_kernels.patterns.rows import Role, pack_tree_mask, unpack_tree_mask

TREES = {
    "default": tree(5),
    "widths": tree((3, 2, 1)),
    "sparse": tree([(0,), (2,), (0, 1), (2, 0), (2, 0, 0), (2, 0, 3)]),
    "chain": tree((1, 1, 1)),
}


def parents_of(nodes: int) -> list[int]:
    return [-1, *(int(torch.randint(node, ())) for node in range(1, nodes))]


def is_ancestor(parents: list[int], k: int, q: int) -> bool:
    """Whether node k is q, or one can go up from q to k."""
    while q > k:
        q = parents[q]
    return q == k


# The pattern.


@pytest.mark.parametrize("nodes", [1, 2, 13, 31, 32, 33, 65, 100])
def test_nodes_see_their_ancestors_and_themselves(nodes: int) -> None:
    parents = parents_of(nodes)
    pattern = patterns.tree(parents)
    expected = torch.tensor([[is_ancestor(parents, k, q) for k in range(nodes)] for q in range(nodes)])
    assert torch.equal(pattern.dense(), expected)
    assert torch.equal(pattern.dense(3), torch.nn.functional.pad(expected, (3, 0), value=True))
    assert pattern.positions.tolist() == (expected.sum(1) - 1).tolist()
    assert pattern.roles.tolist() == [Role.DRAFT] * nodes
    assert pattern.kept_len == nodes
    assert pattern.causal_len == pattern.lead_end == 0
    assert pattern.tree_mask is not None
    assert pattern.tree_mask.shape == (nodes, (nodes + 31) // 32)
    assert pattern.rows_on("cpu")[3] is pattern.rows_on("cpu")[3]
    assert patterns.causal(3).rows_on("cpu")[3] is None


def test_a_chain_is_causal_and_several_roots_do_not_meet() -> None:
    assert torch.equal(patterns.tree(range(-1, 39)).dense(), patterns.causal(40).dense())
    two = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]])
    assert torch.equal(patterns.tree([-1, -1, 0, 1]).dense(), two.bool())


@pytest.mark.parametrize("window", [1, 2, 4, 50])
def test_windows_count_positions(window: int) -> None:
    parents = parents_of(40)
    pattern = patterns.tree(parents)
    clipped, depth = pattern.windowed(window), pattern.positions.tolist()
    expected = [[is_ancestor(parents, k, q) and depth[q] - depth[k] < window for k in range(40)] for q in range(40)]
    context = [[depth[q] + 5 - k < window for k in range(5)] for q in range(40)]
    assert torch.equal(clipped.dense(5), torch.cat([torch.tensor(context), torch.tensor(expected)], dim=1))
    assert clipped.kept_len == 40


def test_tree_masks_and_back() -> None:
    for keys in (0, 1, 31, 32, 33, 70):
        seen = torch.rand(9, keys) < 0.5
        packed = pack_tree_mask(seen)
        assert packed.dtype == torch.int32
        assert torch.equal(unpack_tree_mask(packed, keys), seen)
    assert pack_tree_mask(torch.arange(32)[None] == 31).item() == -(2**31)


def test_only_what_is_on_a_path_is_kept() -> None:
    """K/V enters the cache of leading rows that each see themselves and what their parent sees, and of no other."""
    good = patterns.tree([-1, 0, 0, 1, 2])

    def kept(row: int, *keys: int, **changes: Any) -> int:
        seen = good.dense()
        seen[row] = torch.tensor([k in keys for k in range(5)])
        return replace(good, tree_mask=pack_tree_mask(seen), **changes).kept_len

    assert kept(3, 0, 1, 3) == 5
    assert kept(3, 0, 1) == 3  # not itself
    assert kept(3, 1, 3) == 3  # not the root
    assert kept(3, 0, 2, 1, 3) == 3  # its parent's sibling too
    assert kept(3, 0, 3) == 3  # a position is missing
    assert kept(1, 0, 1, 2) == 1  # a row after it
    assert kept(3, 3) == 3  # a second root, in the wrong place
    assert kept(3, 0, 1, 3, roles=torch.tensor([1, 1, 1, 2, 1], dtype=torch.int8)) == 3
    assert replace(good, positions=torch.arange(5, dtype=torch.int32)).kept_len == 2
    # Causal rows stay what they are; those with a tree mask are not among them.
    lead = torch.tensor([[0, 1], [0, 2], [0, 2]], dtype=torch.int32)
    mixed = replace(patterns.causal(3), lead=lead, tree_mask=torch.tensor([[0], [0], [4]], dtype=torch.int32))
    assert torch.equal(mixed.dense(), patterns.causal(3).dense())
    assert (mixed.causal_len, mixed.kept_len) == (2, 3)


@pytest.mark.parametrize(
    ("parents", "error", "message"),
    [
        ([], ValueError, r"^parents: expected at least one node, got none$"),
        ([-1, 0.0], TypeError, r"^parents: expected ints, got float for node 1$"),
        ([-1, True], TypeError, r"^parents: expected ints, got bool for node 1$"),
        ([-1, 2], ValueError, r"^parents: expected -1 or a node below 2, got 2 for node 1$"),
        ([-1, -2], ValueError, r"^parents: expected -1 or a node below 2, got -2 for node 1$"),
        ([0], ValueError, r"^parents: expected each before its children, got the cycle 0 -> 0$"),
        ([-1, 0, 4, 2, 3], ValueError, r"^parents: .* got the cycle 2 -> 4 -> 3 -> 2$"),
        ([-1, 2, 0], ValueError, r"^parents: expected each before its children, got node 2 as that of node 1$"),
        ([-1, 3, 3, 2], ValueError, r"^parents: .* got node 3 as that of node 1$"),
    ],
)
def test_bad_parents(parents: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        patterns.tree(parents)


def test_bad_tree_masks() -> None:
    good = patterns.causal(3)

    def make(tree_mask: Any) -> Pattern:
        return replace(good, tree_mask=tree_mask)

    with pytest.raises(TypeError, match=r"^tree_mask: expected an int32 CPU tensor, got torch.int64 on cpu$"):
        make(torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^tree_mask: expected shape \[3, 1\], got \[3, 2\]$"):
        make(torch.zeros(3, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^tree_mask: expected keys below kv_len = 3, got key 31 in row 1$"):
        make(torch.tensor([[0], [-(2**31)], [0]], dtype=torch.int32))
    with pytest.raises(
        ValueError, match=r"^tree_mask: expected keys outside lead \[0, 2\] and own .*, got key 1 in row 1$"
    ):
        make(torch.tensor([[0], [2], [0]], dtype=torch.int32))


def test_packed_sequences_keep_their_trees() -> None:
    one, other = patterns.tree([-1, 0, 0]), patterns.causal(2)
    expected = torch.block_diag(other.dense().int(), one.dense().int(), one.dense().int()).bool()
    assert torch.equal(patterns.packed([other, one, one]).dense(), expected)


# The operators. Parity is in the tables of `tidar_kernels.testing`, which tests/ops/test_step_attention.py runs.


def step_operands(pattern: Pattern, device: str = "cpu", length: int = 20) -> tuple[torch.Tensor, ...]:
    q, k, v = (torch.randn(1, heads, pattern.q_len, 16, device=device) for heads in (4, 2, 2))
    k_cache, v_cache = torch.randn(2, 1, 2, 30, 16, device=device).unbind(0)
    return q, k, v, k_cache, v_cache, torch.tensor([length], device=device)


def test_a_wrong_bit_is_seen() -> None:
    """One bit off, and the CPU path is far from the twin: what parity measures is there to be measured."""
    pattern = testing.random_tree(40)
    operands = step_operands(pattern)
    expected = eager.step_attention(*operands, pattern)
    torch.testing.assert_close(ops.step_attention(*operands, pattern), expected, rtol=1e-5, atol=1e-5)
    seen = pattern.dense()
    seen[39, 0] = False
    found = ops.step_attention(*operands, replace(pattern, tree_mask=pack_tree_mask(seen)))
    assert torch.equal(found[:, :, :39], ops.step_attention(*operands, pattern)[:, :, :39])
    assert (found - expected)[:, :, 39].norm() > 1e-3


@pytest.mark.parametrize("device", KERNELS)
def test_rows_do_not_depend_on_the_tree_masks_of_others(device: str) -> None:
    """Other rows' tree masks decide which tiles are visited; a row's result stays, bit for bit."""
    pattern = testing.random_tree(50)
    operands = step_operands(pattern, device)
    out = ops.step_attention(*operands, pattern, backend="triton")
    for kept in (slice(0, 1), slice(30, 35)):
        seen = torch.ones(50, 50, dtype=torch.bool)
        seen[kept] = pattern.dense()[kept]
        changed = ops.step_attention(*operands, replace(pattern, tree_mask=pack_tree_mask(seen)), backend="triton")
        assert torch.equal(changed[:, :, kept], out[:, :, kept])
        seen[:] = False
        seen[kept] = pattern.dense()[kept]
        changed = ops.step_attention(*operands, replace(pattern, tree_mask=pack_tree_mask(seen)), backend="triton")
        assert torch.equal(changed[:, :, kept], out[:, :, kept])


def test_tree_masks_may_differ_where_intervals_do_not() -> None:
    """The CPU path keeps its masks by interval tensors: patterns that share these have masks of their own."""
    first = patterns.tree([-1, 0, 0, 1])
    second = replace(first, tree_mask=patterns.tree([-1, 0, 1, 2]).tree_mask)
    operands = step_operands(first)
    for pattern in (first, second, first):
        found, expected = ops.step_attention(*operands, pattern), eager.step_attention(*operands, pattern)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_operator_as_torch_library_sees_it() -> None:
    pattern = patterns.tree([-1, 0, 0, 1])
    lead, own, _ = pattern.on("cpu")
    arguments = (*step_operands(pattern), lead, own, 0.25, 30, None, None, None, pattern.rows_on("cpu")[3])
    torch.library.opcheck(torch.ops.tidar_kernels.step_attention.default, arguments)


def test_what_cannot_hold_for_trees_is_refused() -> None:
    pattern = patterns.tree([-1, 0, 0])
    q, k, v, *_ = step_operands(pattern)
    with pytest.raises(
        ValueError, match=r'^pattern: expected one without tree mask, or backend="eager", got tree\(3 nodes'
    ):
        ops.attention(q, k, v, pattern)
    assert ops.attention(q, k, v, pattern, backend="eager").shape == q.shape
    with pytest.raises(ValueError, match=r"^pattern: expected one without tree mask for exact rows, got tree\(3 nodes"):
        exact_rows(pattern)


# The cache.


def test_an_accepted_path_is_as_if_decoded_alone() -> None:
    """A layer writes the K/V of all nodes; moved together, those of a path are what its tokens alone would leave."""
    torch.manual_seed(0)
    layer, rope = TiDARAttention(64, 4, 2, qk_norm=True).eval(), RotaryEmbedding(16)
    parents = [-1, 0, 0, 1, 1, 2, 4, 6]
    pattern = patterns.tree(parents)
    path = [0, 1, 4, 6]
    x = torch.randn(1, 8, 64)
    sizes: dict[str, Any] = {"num_layers": 1, "batch_size": 1, "num_kv_heads": 2, "head_dim": 16, "max_len": 20}

    def run(pattern: Pattern, rows: list[int]) -> tuple[torch.Tensor, KVCache]:
        cache = KVCache(**sizes)
        cache.k.fill_(torch.nan)
        cache.v.fill_(torch.nan)
        torch.manual_seed(1)
        for held in (cache.k, cache.v):
            held[:, :, :, :5] = torch.randn(1, 1, 2, 5, 16)
        cache.commit(5)
        rotary = rope(cache.lengths[:, None] + pattern.positions, x.dtype)
        with torch.no_grad():
            return layer(x[:, rows], pattern, rotary=rotary, cache=cache), cache

    out, cache = run(pattern, list(range(8)))
    alone, expected = run(patterns.causal(4), path)
    torch.testing.assert_close(out[:, path], alone, rtol=1e-5, atol=1e-5)
    before = cache.k.clone()
    cache.compact(torch.tensor([[*path, -1]]))
    cache.commit(4)
    assert torch.equal(cache.k[:, :, :, 5:9], before[:, :, :, [5 + node for node in path]])
    for found, plain in ((cache.k, expected.k), (cache.v, expected.v)):
        torch.testing.assert_close(found[:, :, :, :9], plain[:, :, :, :9], rtol=1e-5, atol=1e-5)


# Decoding.


@pytest.fixture(scope="module")
def model() -> Transformer:
    return sharp_model()


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.8, "seed": 1},
        {"temperature": 0.8, "seed": 2, "top_k": 5, "top_p": 0.9},
        {"temperature": 1.1, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.5},
    ],
)
def test_output_is_autoregressive(model: Transformer, name: str, params: dict[str, Any]) -> None:
    """Token for token, in a ragged batch; and the cache holds the accepted tokens' K/V, not that of other nodes."""
    expected = Decoder(model, mode="autoregressive").generate(PROMPTS, 33, **params)
    found = Decoder(model, strategy=TREES[name]).generate(PROMPTS, 33, **params)
    assert found.tokens == expected.tokens
    for b, tokens in enumerate(expected.tokens):
        length = len(PROMPTS[b]) + len(tokens)
        assert int(found.cache.lengths[b]) == length
        for mine, plain in ((found.cache.k, expected.cache.k), (found.cache.v, expected.cache.v)):
            torch.testing.assert_close(mine[:, b, :, :length], plain[:, b, :, :length], rtol=1e-4, atol=1e-4)


@pytest.mark.interpret
def test_by_the_kernels(model: Transformer) -> None:
    params: dict[str, Any] = {"temperature": 0.8, "seed": 3}
    expected = Decoder(model, mode="autoregressive").generate(PROMPTS[:2], 3, **params)
    assert Decoder(model, strategy=tree((2, 1))).generate(PROMPTS[:2], 3, **params).tokens == expected.tokens


@pytest.mark.parametrize("params", [{}, {"temperature": 0.8, "seed": 5}])
def test_more_is_accepted_than_of_a_chain(model: Transformer, params: dict[str, Any]) -> None:
    """The chain's drafts are the tree's first choices, so a step never commits less after the same tokens."""
    prompts = [[token] for token in range(20)]
    chain = Decoder(model, strategy=SelfSpeculation(4)).generate(prompts, 40, **params)
    same = Decoder(model, strategy=tree((1, 1, 1))).generate(prompts, 40, **params)
    wide = Decoder(model, strategy=tree((4, 2, 1))).generate(prompts, 40, **params)
    assert same.tokens == chain.tokens == wide.tokens
    assert same.accepted == chain.accepted
    assert wide.tokens_per_forward > 1.1 * chain.tokens_per_forward


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_right_node_is_accepted(rank: int) -> None:
    """Masks whose rank-th guess is right for sure: the path of these ranks is accepted, whole, in every step."""
    model, chain = certain(7, 12)
    tables = model.tables.view(7, model.offsets, -1)
    for wrong in range(rank):  # better scores for tokens that are not the right one
        right = tables[:, 1:, :7].argmax(-1)
        other = (right + 1) % 7
        if wrong == 1:
            other = (right + 2) % 7
        tables[:, 1:].scatter_(-1, other[..., None], 60.0 - wrong)
    paths = [(0,), (1,), (2,), (rank, 0), (rank, 1), (rank, 2), (rank, rank, rank)]
    shape = Tree(sorted(set(paths)))
    shape.step, steps = counting(shape)
    tokens, forwards = decode_chain(model, shape, [SamplingParams()], 12)
    assert tokens[0].tolist() == chain[:12]
    assert steps == [4, 4, 4]
    assert forwards == 2 * 3


def counting(strategy: Tree) -> tuple[Any, list[int]]:
    step, steps = strategy.step, list[int]()

    def counted(batch: Batch) -> StepResult:
        outcome = step(batch)
        steps.append(int(outcome.verified.accepted))
        return outcome

    return counted, steps


def test_law_of_the_first_four_tokens() -> None:
    model = toy(4, 12)
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(20_000)]
    tokens, _ = decode_chain(model, tree((2, 2, 1)), params, 4)
    table = model.tables.view(4, model.offsets, 5)[:, 0, :4]
    found, limit = distance(tokens, chain_law(table, 0, 4, params[0]))
    assert found <= limit


def test_more_ranks_than_tokens() -> None:
    """Candidates run out; the nodes that have none are never accepted."""
    model, chain = certain(3, 12)
    shape = tree((5, 5))
    tokens, _ = decode_chain(model, shape, [SamplingParams()], 9)
    assert tokens[0].tolist() == chain[:9]


def test_bad_logits_end_the_request(model: Transformer) -> None:
    """NaN in a row that the path comes to: an error as in every strategy, and other requests go on."""
    decoder = Decoder(model, strategy=tree((2, 1)), batch_size=2)
    whole = Decoder(model, mode="autoregressive").generate(PROMPTS[0], 12).tokens[0]
    ids = decoder.add(PROMPTS[0], 12), decoder.add([7, 7], 12)
    requests = [decoder.session.requests[request] for request in ids]
    logits = type(model).logits
    calls = itertools.count()

    def poisoned(self: Transformer, hidden: torch.Tensor) -> torch.Tensor:
        out = logits(self, hidden)
        if next(calls) >= 4:  # the second step's
            out = out.clone()
            out[1] = torch.nan
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "logits", poisoned)
        while decoder.session.requests:
            decoder.step()
    assert requests[0].tokens == whole
    assert requests[1].finish_reason == "error"
    assert "expected finite logits" in str(requests[1].error)


def test_shapes() -> None:
    assert tree((2, 1)).paths == ((0,), (1,), (0, 0), (1, 0))
    assert tree([(1,), (0,), (0, 0)]).paths == ((0,), (1,), (0, 0))
    for tokens in (2, 4, 8, 16):
        shape = tree(tokens)
        assert shape.drafts == tokens
        assert shape.slots == len(shape.paths) + 1 == 2 * tokens
    assert Decoder(Transformer(CONFIG), 8, strategy="tree").block_size == 8


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tree(1), ValueError, r"^shape: expected >= 2, got 1$"),
        (lambda: tree(()), ValueError, r"^shape: expected a number of tokens, widths or paths, got \(\)$"),
        (lambda: tree(2.5), ValueError, r"^shape: expected a number of tokens, widths or paths, got 2.5$"),
        (lambda: tree((2, 0)), ValueError, r"^shape: expected >= 1, got 0$"),
        (lambda: tree((2, (0,))), TypeError, r"^shape: expected widths or paths, got both in "),
        (lambda: Tree([]), ValueError, r"^paths: expected at least one, got none$"),
        (lambda: Tree([(0,), ()]), ValueError, r"^paths: expected one rank or more a node, got \(\)$"),
        (lambda: Tree([(0,), (0,)]), ValueError, r"^paths: expected each node once, got \(0,\) twice$"),
        (
            lambda: Tree([(0,), (1, 0)]),
            ValueError,
            r"^paths: expected the node \(1,\) that leads to \(1, 0\)",
        ),
        (lambda: Tree([(-1,)]), ValueError, r"^paths: expected >= 0, got -1$"),
        (lambda: Tree([(0.5,)]), TypeError, r"^paths: expected an int, got float$"),
        (
            lambda: StepConfig(tree(4), rule="rejection"),
            ValueError,
            r'^sampling: expected coupled for strategy "tree", got ',
        ),
        (
            lambda: StepConfig(tree(4), rule="point_mass"),
            ValueError,
            r"^sampling: expected coupled .* got 'point_mass'$",
        ),
        (lambda: StepConfig(tree(4), exact=True), ValueError, r'^exact: expected False for strategy "tree", got True$'),
        (
            lambda: Decoder(Transformer(CONFIG), 4, strategy="tree", beta=0.5),
            ValueError,
            r"^beta: expected 1 for strategies but",
        ),
    ],
)
def test_bad_shapes_and_settings(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_the_cache_must_hold_all_nodes(model: Transformer) -> None:
    shape = tree((3, 2, 1))
    needed = 5 + 10 + shape.slots
    with pytest.raises(ValueError, match=rf"^max_len: expected >= {needed} .* got {needed - 1}$"):
        Decoder(model, strategy=shape, max_len=needed - 1).generate(PROMPTS[0], 10)
    full = Decoder(model, strategy=shape, max_len=needed).generate(PROMPTS[0], 10)
    assert full.tokens == Decoder(model, mode="autoregressive").generate(PROMPTS[0], 10).tokens
