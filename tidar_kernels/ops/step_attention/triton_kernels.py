"""Step attention: the rows of one decode step against the cached context and each other.

Computes, for every row of every sequence (twin: `tidar_kernels.eager.step_attention`):

    out = softmax(scale * q K^T) V   over cache slots [0, P) and the in-flight keys in the row's lead, own or tree mask

Keys lie on one line of absolute positions: below P, key n is cache slot n; from P on it is in-flight key n - P. Tiles
and splits are aligned on that line, so they hold the same keys whether a draft is in flight or already committed. Only
a row's *own* block, whose keys no other row finds on the line, has tiles of its own, aligned to in-flight indices; so
have the paths of a token tree (the *tree mask*). A program takes BLOCK_M packed rows (q_len x the heads of one kv head)
and one split of the line:

    1. whole tiles below P                  no mask
    2. from the tile of P to lead's end     spliced tiles, cache below P and in-flight from P on, masked by lead
    3. split 0 only: own and tree mask      in-flight tiles, masked by them

With a sliding window (`reach`) a row's part of the line starts later. Tiles before every row's first key are skipped;
tiles that only some rows see, or see in part, come before step 1, masked. Tiles stay where they are, so bits stay too.
Sinks, one more logit a head (`softmax_start`), belong to split 0.

Pages, float8 and values of another width are read where they lie: a tile's places are looked up in the block table, its
bytes decoded and scaled before they multiply. The tiles, their order and the products are those of a contiguous cache,
so the bits are too.

The requests of a ragged batch lie one after another, and the device alone knows which rows are whose. A program finds
its request by its row tile (`_row_tile_of`), and a row of the merge its own; the rows of the patterns are read in their
table. What follows is that of the request alone, so the bits are too.

A program whose split holds no key of its rows returns at once, unless it is of split 0. With several splits a second
kernel merges the partial results by log-sum-exp, one after another in split order (`_fold`): of each row split 0 and
the splits in which it sees keys. So a row's result does not depend on what other rows made a program write, and no
memory is read that was not written.

Where row tiles are many (`configs.programs_of_a_tile`), few programs share the splits of one: program p of n takes p,
p + n, .. as far as there are keys, so that not many are launched for nothing. A program that has all of them folds each
into the result of those before it, as the second kernel would: the same operations in the same order, so the same
bits, and no partial results.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton.paging import cached_places, cached_tile
from .._triton.ragged import sequence_of
from .._triton.softmax import attend_whole_tiles, raw_scores, softmax_finish, softmax_start, softmax_update
from .._triton.tiles import load_interval, load_tile, row_pointers


@triton.jit
def _context_len(lengths, b, max_context, requests):
    """Tokens of context, never outside the cache whatever `lengths` holds; 0 of rows that are nobody's."""
    if requests is None:
        length = tl.load(lengths + b)
    else:
        length = tl.load(lengths + b, mask=b < requests.batch, other=0)
    return tl.minimum(tl.maximum(length.to(tl.int32), 0), max_context)


@triton.jit
def _first_keys(reach, row, in_bounds, context, lead_lo, lead_hi):
    """Of each row the first cache slot that it sees (`context` if none), and its first key on the line."""
    first_slot = tl.maximum(context - tl.load(reach + row, mask=in_bounds, other=0), 0)
    # A row that sees no context starts at lead; one that sees neither starts past every key.
    in_flight = context + tl.where(lead_lo < lead_hi, lead_lo, 0x3FFFFFFF)
    return first_slot, tl.where(first_slot < context, first_slot, in_flight)


@triton.jit
def _spliced_tile(cache_ptrs, new_ptrs, cached, in_bounds, HEAD_DIM: tl.constexpr, ONE_LOAD: tl.constexpr):
    """The tile whose keys lie at `cache_ptrs` where `cached`, else at `new_ptrs`; 0 where not `in_bounds`."""
    if ONE_LOAD:
        tile = load_tile(tl.where(cached[:, None], cache_ptrs, new_ptrs), in_bounds, HEAD_DIM)
    else:
        tile = load_tile(cache_ptrs, in_bounds & cached, HEAD_DIM)
        tile = tl.where(cached[:, None], tile, load_tile(new_ptrs, in_bounds & ~cached, HEAD_DIM))
    return tile


@triton.jit
def _tree_words(kv_len, requests):
    """`(words that have keys, words of a row)` of a tree mask."""
    words = tl.cdiv(kv_len, 32)
    words_of_row = words
    if requests is not None:  # a row has as many as the widest tree needs
        words_of_row = requests.words
        words = tl.minimum(words, words_of_row)
    return words, words_of_row


@triton.jit
def _cover_tree_mask(own_start, own_end, tree_mask, row, in_bounds, kv_len, requests, BLOCK_N: tl.constexpr):
    """The `(start, end)` of the own tiles, widened to every 32-key word in which some row's tree mask has a key."""
    words, words_of_row = _tree_words(kv_len, requests)
    for i in range(0, words):
        word = tl.load(tree_mask + row.to(tl.int64) * words_of_row + i, mask=in_bounds, other=0)
        if tl.max((word != 0).to(tl.int32), 0) > 0:
            own_start = tl.minimum(own_start, i * 32 // BLOCK_N * BLOCK_N)
            own_end = tl.maximum(own_end, tl.minimum(i * 32 + 32, kv_len))
    return own_start, own_end


@triton.jit
def _add_tree_mask(visible, tree_mask, row, in_bounds, n0, kv_len, requests, BLOCK_N: tl.constexpr):
    """`visible`, and the keys of the tile at n0 in each row's tree mask: one load per row and 32-key word."""
    words, words_of_row = _tree_words(kv_len, requests)
    n = n0 + tl.arange(0, BLOCK_N)
    for i in tl.static_range((BLOCK_N + 31) // 32):
        index = n0 // 32 + i
        word = tl.load(tree_mask + row.to(tl.int64) * words_of_row + index, mask=in_bounds & (index < words), other=0)
        in_tree = ((word[:, None] >> (n % 32)[None, :]) & 1 != 0) & (n // 32 == index)[None, :]
        if requests is not None:  # a cut request has not all keys of its pattern
            in_tree = in_tree & (n < kv_len)[None, :]
        visible = visible | in_tree
    return visible


@triton.jit
def _rows_of(b, q_len, requests):
    """`(first, count, table_first, table_count)` of request b, a number or one a row.

    Its rows are `[first, first + count)` of the launch's `q_len`, those of its pattern `[table_first, table_first +
    table_count)` of the table. Request `requests.batch` has the rows that are nobody's, and no pattern. All stay within
    the tensors, whatever the device holds.
    """
    somebodys = b < requests.batch
    first = tl.minimum(tl.maximum(tl.load(requests.ptr + b), 0), q_len)
    end = tl.minimum(tl.maximum(tl.load(requests.ptr + b + 1, mask=somebodys, other=q_len), first), q_len)
    kind = tl.load(requests.kinds + b, mask=somebodys & (first < end), other=-1)
    exists = (kind >= 0) & (kind < requests.num_kinds)
    table_first = tl.load(requests.offsets + kind, mask=exists, other=0)
    table_end = tl.load(requests.offsets + kind + 1, mask=exists, other=0)
    return first, end - first, table_first, table_end - table_first


@triton.jit
def _row_tile_of(index, q_len, group, requests, BLOCK_M: tl.constexpr):
    """`(request, tile)` of row tile `index` of a launch: the tile's number among those of its request.

    Request b has the indices from `cu_rows[b] * group // BLOCK_M + b` on: as many as its tiles, or one more.
    """
    request = 0
    for first in range(0, requests.batch, 64):
        i = first + tl.arange(0, 64)
        end = tl.minimum(tl.maximum(tl.load(requests.ptr + 1 + i, mask=i < requests.batch, other=0), 0), q_len)
        begins = (end * group // BLOCK_M + i + 1 <= index) & (i < requests.batch)
        request += tl.sum(begins.to(tl.int32), 0)
    start = tl.minimum(tl.maximum(tl.load(requests.ptr + request), 0), q_len)
    return request, index - (start * group // BLOCK_M + request)


@triton.jit
def _cut(lo, hi, count):
    """Intervals `[lo, hi)` of keys of which there are only `count`: (0, 0) where nothing is left."""
    hi = tl.minimum(hi, count)
    return tl.where(lo < hi, lo, 0), tl.where(lo < hi, hi, 0)


@triton.jit(do_not_specialize=["kv_len", "num_kv_heads"])
def sound_keys_kernel(
    k, v, k_out, v_out, kv_len, num_kv_heads,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Copies of BLOCK_T keys in flight of one kv head: where a value is not finite, v becomes 0 and k NaN.

    A row gives weight 0 to keys that it does not see, and 0 * NaN is NaN: the product of a tile would carry one row's
    NaN to all rows of the tile. With such a value in its key instead, exactly the rows that see it become NaN, for a
    mask takes scores out by selection. In a launch of its own: within the attention kernel it cost the registers that
    overlap a tile's softmax with the next tile's MMAs.
    """
    b, head = (tl.program_id(0) // num_kv_heads).to(tl.int64), (tl.program_id(0) % num_kv_heads).to(tl.int64)
    row = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_bounds = (row < kv_len)[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    in_bounds_v = (row < kv_len)[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM_V)
    k_tile = tl.load(row_pointers(k, b * k.stride[0] + head * k.stride[1], row, BLOCK_D), mask=in_bounds)
    v_ptrs = row_pointers(v, b * v.stride[0] + head * v.stride[1], row, BLOCK_D)
    v_tile = tl.load(v_ptrs, mask=in_bounds_v, other=0.0)
    wide = v_tile.to(tl.float32)  # of half types and back: the same value
    broken = tl.max((wide - wide != 0.0).to(tl.int32), 1)[:, None] > 0
    k_out_ptrs = row_pointers(k_out, b * k_out.stride[0] + head * k_out.stride[1], row, BLOCK_D)
    tl.store(k_out_ptrs, tl.where(broken, float("nan"), k_tile.to(tl.float32)).to(k_tile.dtype), mask=in_bounds)
    v_out_ptrs = row_pointers(v_out, b * v_out.stride[0] + head * v_out.stride[1], row, BLOCK_D)
    tl.store(v_out_ptrs, tl.where(broken, 0.0, wide).to(v_tile.dtype), mask=in_bounds_v)


@triton.jit
def _attend_cached_tiles(
    acc, m, l, q, k_cache, v_cache, k_scale, v_scale, b, kv_head, context, pages, start, stop, unit2, inner_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr, MANTISSA: tl.constexpr, SCALE_BY_SLOT: tl.constexpr,
):  # fmt: skip
    """`attend_whole_tiles` of a cache with pages, float8 or values of another width: the same products and order."""
    BLOCK_D: tl.constexpr = acc.shape[1]
    # Places are looked up one tile ahead, and carried in registers: copies for the next iterations need not wait for
    # a load of the same iteration.
    page, slot, in_bounds = cached_places(b, start, tl.minimum(context, stop), pages, BLOCK_N, PAGE_SIZE)
    for n0 in tl.range(start, stop, BLOCK_N):
        k_tile = cached_tile(
            k_cache, k_scale, b, kv_head, page, slot, in_bounds, q, HEAD_DIM, BLOCK_D, MANTISSA, SCALE_BY_SLOT
        )
        v_tile = cached_tile(
            v_cache, v_scale, b, kv_head, page, slot, in_bounds, q, HEAD_DIM_V, BLOCK_D, MANTISSA, SCALE_BY_SLOT
        )
        acc, m, l = softmax_update(acc, m, l, raw_scores(q, k_tile), v_tile, unit2, inner_scale, None)
        page, slot, in_bounds = cached_places(b, n0 + BLOCK_N, tl.minimum(context, stop), pages, BLOCK_N, PAGE_SIZE)
    return acc, m, l


@triton.jit
def _fold(acc, m, l, out, lse):
    """`(acc, m, l)` after one more split with results `out` and `lse`, in base 2; nothing changes if it saw no key.

    The one way in which splits are merged, in ascending order: so it does not matter who does it.
    """
    m_new = tl.maximum(m, lse)
    pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
    weight, alpha = tl.exp2(lse - pivot), tl.exp2(m - pivot)
    return tl.fma(acc, alpha[:, None], out * weight[:, None]), m_new, tl.fma(l, alpha, weight)


@triton.jit
def _attend_split(
    split, start, stop, end, begin, context, q_tile, in_bounds, head, b64, kv_head64,
    k, v, k_offset, v_offset, k_cache, v_cache, k_cache_offset, v_cache_offset, pages, k_scale, v_scale,
    lead_lo, lead_hi, own_lo, own_hi, first_slot, sinks, tree_mask, table_row, in_table, kv_len, requests,
    unit2, inner_scale, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ONE_LOAD: tl.constexpr, SCORES_AHEAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, MANTISSA: tl.constexpr, SCALE_BY_SLOT: tl.constexpr,
):  # fmt: skip
    """`(acc, m, l)` of a row tile over the keys of one split, and in split 0 over own blocks, tree mask and sinks.

    Rows see no key of the line from `end` on, nor with a window before `begin`, which is None without one, and of the
    cache only slots from `first_slot` on.
    """
    # A contiguous cache of one width and the dtype of q: its loop has pointers that advance, and loads without a mask.
    DIRECT: tl.constexpr = pages is None and MANTISSA == 0 and HEAD_DIM == HEAD_DIM_V
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m, l = softmax_start(sinks, head, in_bounds & (split == 0), BLOCK_M)
    key = tl.arange(0, BLOCK_N)

    # 1. whole tiles of context; with a window, first those that some row does not see all of
    whole_end = tl.minimum(stop, context // BLOCK_N * BLOCK_N)
    if begin is not None:
        start = tl.maximum(start, begin)
        whole_start = tl.minimum(tl.cdiv(tl.max(tl.where(in_bounds, first_slot, 0), 0), BLOCK_N) * BLOCK_N, whole_end)
        for n0 in tl.range(start, whole_start, BLOCK_N, num_stages=1):
            n = n0 + key
            if DIRECT:
                k_tile = load_tile(row_pointers(k_cache, k_cache_offset, n, BLOCK_D), None, HEAD_DIM)
                v_tile = load_tile(row_pointers(v_cache, v_cache_offset, n, BLOCK_D), None, HEAD_DIM)
            else:
                page, slot, exists = cached_places(b64, n0, context, pages, BLOCK_N, PAGE_SIZE)
                k_tile = cached_tile(
                    k_cache, k_scale, b64, kv_head64, page, slot, exists, q_tile,
                    HEAD_DIM, BLOCK_D, MANTISSA, SCALE_BY_SLOT,
                )  # fmt: skip
                v_tile = cached_tile(
                    v_cache, v_scale, b64, kv_head64, page, slot, exists, q_tile,
                    HEAD_DIM_V, BLOCK_D, MANTISSA, SCALE_BY_SLOT,
                )  # fmt: skip
            visible = n[None, :] >= first_slot[:, None]
            acc, m, l = softmax_update(acc, m, l, raw_scores(q_tile, k_tile), v_tile, unit2, inner_scale, visible)
        start = tl.maximum(start, whole_start)
    if DIRECT:
        acc, m, l = attend_whole_tiles(
            acc, m, l, q_tile, k_cache, k_cache_offset, v_cache, v_cache_offset, start, whole_end, unit2, inner_scale,
            HEAD_DIM, BLOCK_N, SCORES_AHEAD,
        )  # fmt: skip
    else:
        acc, m, l = _attend_cached_tiles(
            acc, m, l, q_tile, k_cache, v_cache, k_scale, v_scale, b64, kv_head64, context, pages, start, whole_end,
            unit2, inner_scale, HEAD_DIM, HEAD_DIM_V, BLOCK_N, PAGE_SIZE, MANTISSA, SCALE_BY_SLOT,
        )  # fmt: skip

    # 2. the tiles where the context ends and the drafts begin
    for n0 in tl.range(tl.maximum(start, whole_end), tl.minimum(stop, end), BLOCK_N, num_stages=1):
        n = n0 + key
        cached, new = n < context, n - context
        if DIRECT:
            k_cache_ptrs = row_pointers(k_cache, k_cache_offset, n, BLOCK_D)
            k_ptrs = row_pointers(k, k_offset, new, BLOCK_D)
            v_cache_ptrs = row_pointers(v_cache, v_cache_offset, n, BLOCK_D)
            v_ptrs = row_pointers(v, v_offset, new, BLOCK_D)
            k_tile = _spliced_tile(k_cache_ptrs, k_ptrs, cached, n < end, HEAD_DIM, ONE_LOAD)
            v_tile = _spliced_tile(v_cache_ptrs, v_ptrs, cached, n < end, HEAD_DIM, ONE_LOAD)
        else:
            page, slot, exists = cached_places(b64, n0, context, pages, BLOCK_N, PAGE_SIZE)
            k_tile = cached_tile(
                k_cache, k_scale, b64, kv_head64, page, slot, exists, q_tile, HEAD_DIM, BLOCK_D, MANTISSA, SCALE_BY_SLOT
            )
            v_tile = cached_tile(
                v_cache, v_scale, b64, kv_head64, page, slot, exists, q_tile,
                HEAD_DIM_V, BLOCK_D, MANTISSA, SCALE_BY_SLOT,
            )  # fmt: skip
            in_flight = (n < end) & ~cached
            k_new = load_tile(row_pointers(k, k_offset, new, BLOCK_D), in_flight, HEAD_DIM)
            v_new = load_tile(row_pointers(v, v_offset, new, BLOCK_D), in_flight, HEAD_DIM_V)
            k_tile, v_tile = tl.where(cached[:, None], k_tile, k_new), tl.where(cached[:, None], v_tile, v_new)
        in_lead = (new[None, :] >= lead_lo[:, None]) & (new[None, :] < lead_hi[:, None])
        visible = cached[None, :] | in_lead
        if begin is not None:
            visible = visible & ((n[None, :] >= first_slot[:, None]) | ~cached[None, :])
        acc, m, l = softmax_update(acc, m, l, raw_scores(q_tile, k_tile), v_tile, unit2, inner_scale, visible)

    # 3. the rows' own blocks and tree mask: tiles are aligned to in-flight indices, whatever rows share the program
    if split == 0:
        has_own = own_lo < own_hi
        own_start = tl.min(tl.where(has_own, own_lo, kv_len), 0) // BLOCK_N * BLOCK_N
        own_end = tl.max(own_hi, 0)
        if tree_mask is not None:
            own_start, own_end = _cover_tree_mask(
                own_start, own_end, tree_mask, table_row, in_table, kv_len, requests, BLOCK_N
            )
        for n0 in tl.range(own_start, own_end, BLOCK_N, num_stages=1):
            n = n0 + key
            k_tile = load_tile(row_pointers(k, k_offset, n, BLOCK_D), n < own_end, HEAD_DIM)
            v_tile = load_tile(row_pointers(v, v_offset, n, BLOCK_D), n < own_end, HEAD_DIM_V)
            visible = (n[None, :] >= own_lo[:, None]) & (n[None, :] < own_hi[:, None])
            if tree_mask is not None:
                visible = _add_tree_mask(visible, tree_mask, table_row, in_table, n0, kv_len, requests, BLOCK_N)
            acc, m, l = softmax_update(acc, m, l, raw_scores(q_tile, k_tile), v_tile, unit2, inner_scale, visible)

    return acc, m, l


@triton.jit
def _store_rows(
    out, lse, result, lse2, split, b, b64, head64, first, row, dim, in_bounds, row_tiles, num_kv_heads, group, q_len,
    requests, HEAD_DIM_V: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Write `result` and `lse2` of a row tile where the results of one split go; arguments as in the kernel below."""
    batch = tl.num_programs(0) // row_tiles // num_kv_heads
    if requests is not None:
        b, b64, row = 0, tl.cast(0, tl.int64), first + row
    row_offset = ((split * batch + b).to(tl.int64) * num_kv_heads * group + head64) * q_len + row
    if PARTIAL:
        tl.store(lse + row_offset, lse2, mask=in_bounds)
    else:
        tl.store(lse + row_offset, lse2 * 0.6931471805599453, mask=in_bounds)
    out_ptrs = out.ptr + split.to(tl.int64) * out.stride[0] + b64 * out.stride[1] + head64 * out.stride[2]
    out_ptrs = out_ptrs + row.to(tl.int64) * out.stride[3]
    out_ptrs = out_ptrs[:, None] + dim.to(tl.int64)[None, :] * out.stride[4]
    tl.store(out_ptrs, result.to(out.ptr.dtype.element_ty), mask=in_bounds[:, None] & (dim[None, :] < HEAD_DIM_V))


# Not specialised: one row and many, one head and many, run the same binary; and fewer binaries are built.
@triton.jit(
    do_not_specialize=["q_len", "num_kv_heads", "group", "kv_len", "max_context"],
    do_not_specialize_on_alignment=["lengths", "lead", "own", "reach", "tree_mask"],
)
def step_attention_kernel(
    q, k, v, k_cache, v_cache, pages, k_scale, v_scale, lengths, lead, own, reach, sinks, tree_mask, requests,
    out, lse, q_len, num_kv_heads, group, kv_len, max_context, unit2, inner_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, SEVERAL: tl.constexpr, PARTIAL: tl.constexpr, ONE_LOAD: tl.constexpr,
    SCORES_AHEAD: tl.constexpr, PAGE_SIZE: tl.constexpr, MANTISSA: tl.constexpr, SCALE_BY_SLOT: tl.constexpr,
):  # fmt: skip
    """One row tile of one kv head, one split of the line; with SEVERAL all splits that are its program's share.

    `out [split, batch, heads, q_len, d]` and `lse [split, batch, heads, q_len]` are the results, or with PARTIAL what
    `combine_splits_kernel` merges. lse is in natural log, with PARTIAL in base 2. `reach` is None without a window,
    `sinks` without sinks, `tree_mask` without a tree mask, `inner_scale` without a cap (`score_units`), `pages` without
    pages (`Pages`; else they have PAGE_SIZE slots), `k_scale` and `v_scale` without float8 (else of MANTISSA bits).

    With `requests` (`Requests`) the batch is ragged: q, k, v, out and lse have the rows of all requests one after
    another and a batch of 1, `q_len` is their number, and a tile has rows of one request.
    """
    # Row tiles are the fastest index: those that read the same K/V run at the same time.
    if requests is None:
        row_tiles = tl.cdiv(q_len * group, BLOCK_M)
        kv_sequence = tl.program_id(0) // row_tiles
        b, kv_head, split = kv_sequence // num_kv_heads, kv_sequence % num_kv_heads, tl.program_id(1)
        packed = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        row = packed // group
        head = kv_head * group + packed % group
        in_bounds = row < q_len
        first, table_row, in_table = None, row, in_bounds
    else:
        row_tiles = tl.num_programs(0) // num_kv_heads
        kv_head, split = tl.program_id(0) // row_tiles, tl.program_id(1)
        b, tile = _row_tile_of(tl.program_id(0) % row_tiles, q_len, group, requests, BLOCK_M)
        first, kv_len, table_first, table_count = _rows_of(b, q_len, requests)  # rows are keys
        if (tile < 0) | (tile * BLOCK_M >= kv_len * group):
            return
        packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row = packed // group
        head = kv_head * group + packed % group
        in_bounds = row < kv_len
        table_row, in_table = table_first + row, in_bounds & (row < table_count)

    context = _context_len(lengths, b, max_context, requests)
    lead_lo, lead_hi = load_interval(lead, table_row, in_table)
    own_lo, own_hi = load_interval(own, table_row, in_table)
    if requests is not None:
        lead_lo, lead_hi = _cut(lead_lo, lead_hi, kv_len)
        own_lo, own_hi = _cut(own_lo, own_hi, kv_len)
    end = context + tl.max(lead_hi, 0)
    start = split * SPLIT
    stop = start + SPLIT
    if (start >= end) & (split > 0):
        return
    begin, first_slot = None, None
    if reach is not None:
        first_slot, first_key = _first_keys(reach, table_row, in_table, context, lead_lo, lead_hi)
        begin = tl.min(first_key, 0) // BLOCK_N * BLOCK_N
        if not SEVERAL:
            if (begin >= stop) & (split > 0):
                return

    b64, head64, kv_head64 = b.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    if requests is None:
        q_ptrs = row_pointers(q, (b64 * q.stride[0] + head64 * q.stride[1])[:, None], row, BLOCK_D)
        q_tile = load_tile(q_ptrs, in_bounds, HEAD_DIM)
        k_offset = b64 * k.stride[0] + kv_head64 * k.stride[1]
        v_offset = b64 * v.stride[0] + kv_head64 * v.stride[1]
    else:
        q_ptrs = row_pointers(q, (head64 * q.stride[1])[:, None], first + row, BLOCK_D)
        q_tile = load_tile(q_ptrs, in_bounds, HEAD_DIM)
        k_offset = tl.cast(first, tl.int64) * k.stride[2] + kv_head64 * k.stride[1]
        v_offset = tl.cast(first, tl.int64) * v.stride[2] + kv_head64 * v.stride[1]
    k_cache_offset = b64 * k_cache.stride[0] + kv_head64 * k_cache.stride[1]
    v_cache_offset = b64 * v_cache.stride[0] + kv_head64 * v_cache.stride[1]

    if SEVERAL:
        # Split 0, and then those from the first in which some row sees a key.
        splits = tl.maximum(tl.cdiv(end, SPLIT), 1)
        skipped = 0
        if begin is not None:
            skipped = tl.minimum(tl.maximum(begin // SPLIT - 1, 0), splits - 1)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        step = 1
        if PARTIAL:
            step = tl.num_programs(1)
        for i in tl.range(split if PARTIAL else 0, splits - skipped, step, num_stages=1):
            one = i
            if begin is not None:
                one = tl.where(i == 0, 0, i + skipped)
            one_acc, one_m, one_l = _attend_split(
                one, one * SPLIT, one * SPLIT + SPLIT, end, begin, context, q_tile, in_bounds, head, b64, kv_head64,
                k, v, k_offset, v_offset, k_cache, v_cache, k_cache_offset, v_cache_offset, pages, k_scale, v_scale,
                lead_lo, lead_hi, own_lo, own_hi, first_slot, sinks, tree_mask, table_row, in_table, kv_len, requests,
                unit2, inner_scale, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_M, BLOCK_N, ONE_LOAD, SCORES_AHEAD,
                PAGE_SIZE, MANTISSA, SCALE_BY_SLOT,
            )  # fmt: skip
            result, lse2 = softmax_finish(one_acc, one_m, one_l)
            if PARTIAL:
                _store_rows(
                    out, lse, result, lse2, one, b, b64, head64, first, row, dim, in_bounds, row_tiles, num_kv_heads,
                    group, q_len, requests, HEAD_DIM_V, PARTIAL,
                )  # fmt: skip
            else:
                acc, m, l = _fold(acc, m, l, result, lse2)
    else:
        acc, m, l = _attend_split(
            split, start, stop, end, begin, context, q_tile, in_bounds, head, b64, kv_head64,
            k, v, k_offset, v_offset, k_cache, v_cache, k_cache_offset, v_cache_offset, pages, k_scale, v_scale,
            lead_lo, lead_hi, own_lo, own_hi, first_slot, sinks, tree_mask, table_row, in_table, kv_len, requests,
            unit2, inner_scale, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_M, BLOCK_N, ONE_LOAD, SCORES_AHEAD,
            PAGE_SIZE, MANTISSA, SCALE_BY_SLOT,
        )  # fmt: skip

    if not (SEVERAL and PARTIAL):
        result, lse2 = softmax_finish(acc, m, l)
        _store_rows(
            out, lse, result, lse2, split, b, b64, head64, first, row, dim, in_bounds, row_tiles, num_kv_heads, group,
            q_len, requests, HEAD_DIM_V, PARTIAL,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["num_heads", "q_len", "max_context"],
    do_not_specialize_on_alignment=["lengths", "lead", "reach"],
)
def combine_splits_kernel(
    part, part_lse, lengths, lead, reach, requests, out, lse,
    num_heads, q_len, max_context,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """`out = sum_s 2^lse_s out_s / sum_s 2^lse_s` for BLOCK_R rows of one head, split by split in ascending order.

    `part [split, batch, heads, q_len, d]` and `part_lse`, in base 2, are partial results; `out` and `lse`, in natural
    log, the results. A row reads split 0 and exactly the splits in which it sees keys, whatever the other rows need.
    Splits that it does not read are exact no-ops. The loads of BLOCK_S splits are independent of each other: one memory
    latency for all of them.

    With `requests` the batch is ragged, as in the kernel above, and each row looks up its request.
    """
    b, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_bounds = row < q_len
    if requests is None:
        table_row, in_table = row, in_bounds
        lead_lo, lead_hi = load_interval(lead, row, in_bounds)
        context = _context_len(lengths, b, max_context, requests)
    else:
        request, _ = sequence_of(row.to(tl.int64), requests)
        first_row, count, table_first, table_count = _rows_of(request, q_len, requests)
        token = row - first_row
        table_row, in_table = table_first + token, in_bounds & (token >= 0) & (token < table_count)
        lead_lo, lead_hi = load_interval(lead, table_row, in_table)
        lead_lo, lead_hi = _cut(lead_lo, lead_hi, count)
        context = _context_len(lengths, request, max_context, requests)
    end = tl.where(in_bounds, tl.maximum(tl.cdiv(context + lead_hi, SPLIT), 1), 0)
    splits = tl.max(end, 0)
    skipped = 0
    if reach is not None:  # split 0, and then from the first in which some row sees a key
        _, first_key = _first_keys(reach, table_row, in_table, context, lead_lo, lead_hi)
        first = first_key // SPLIT
        skipped = tl.maximum(tl.min(tl.minimum(tl.where(in_bounds, first, splits), splits), 0) - 1, 0)

    dim = tl.arange(0, BLOCK_D)
    in_head = dim[None, :] < HEAD_DIM
    row_offset = tl.program_id(0).to(tl.int64) * q_len + row
    rows_per_split = tl.num_programs(0).to(tl.int64) * q_len
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_R], tl.float32)
    for i in range(0, splits - skipped, BLOCK_S):
        for j in tl.static_range(BLOCK_S):
            split = tl.where(i + j == 0, 0, i + j + skipped)
            needed = split < end
            if reach is not None:
                needed = needed & ((split == 0) | (split >= first))
            lse_offset = split * rows_per_split + row_offset
            split_lse = tl.load(part_lse + lse_offset, mask=needed, other=float("-inf"))
            out_offset = lse_offset[:, None] * HEAD_DIM + dim[None, :]
            split_out = tl.load(part + out_offset, mask=needed[:, None] & in_head, other=0.0)
            acc, m, l = _fold(acc, m, l, split_out, split_lse)
    result, lse2 = softmax_finish(acc, m, l)
    tl.store(lse + row_offset, lse2 * 0.6931471805599453, mask=in_bounds)
    out_ptrs = out.ptr + b.to(tl.int64) * out.stride[0] + head.to(tl.int64) * out.stride[1]
    out_ptrs = out_ptrs + row.to(tl.int64)[:, None] * out.stride[2] + dim.to(tl.int64)[None, :] * out.stride[3]
    tl.store(out_ptrs, result.to(out.ptr.dtype.element_ty), mask=in_bounds[:, None] & in_head)
