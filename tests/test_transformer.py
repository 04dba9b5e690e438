"Attention, positions, cache and block against independent implementations and their own limits."
import math

import pytest
import torch
from torch import nn

from minisora.core import generator, num_params
from minisora.transformer import MLP, Attention, Block, KVCache, attention, grid_positions, rope, sincos, sinusoid

close = torch.testing.assert_close


def randn(*shape, seed=0): return torch.randn(*shape, generator=generator(seed))


def plain(q, k, v, seen):  # rows that see nothing give zeros
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num() @ v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n, l", [(6, 6), (2, 6), (1, 6)])
@pytest.mark.parametrize("kind", [None, "keys", "pairs"])
def test_attention_equals_the_formula(causal, n, l, kind):
    q, (k, v) = randn(3, 2, n, 8), randn(2, 3, 2, l, 8, seed=1)
    mask = {None: None, "keys": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] * 6]).bool(), "pairs": randn(3, n, l, seed=2) > 0}[kind]
    seen = torch.ones(3, 1, n, l, dtype=torch.bool)
    if mask is not None: seen = seen & (mask[:, None, None] if kind == "keys" else mask[:, None])
    if causal: seen = seen & (torch.arange(l) <= torch.arange(l - n, l)[:, None])
    close(attention(q, k, v, mask, causal), plain(q, k, v, seen))


def test_a_row_without_keys_gives_zeros_and_finite_gradients():
    q = randn(2, 2, 3, 8).requires_grad_()
    out = attention(q, q, q, torch.tensor([[True, True, False], [False] * 3]))
    out.square().sum().backward()
    assert out[1].eq(0).all() and out[0].ne(0).all() and q.grad.isfinite().all()


def test_cross_attention_equals_torchs():
    ours = Attention(32, 4, context_width=12, qk_norm=False)
    theirs = nn.MultiheadAttention(32, 4, kdim=12, vdim=12, batch_first=True)
    k, v = ours.kv.weight.chunk(2)
    theirs.load_state_dict({"q_proj_weight": ours.q.weight, "k_proj_weight": k, "v_proj_weight": v, "in_proj_bias": torch.cat([ours.q.bias, ours.kv.bias]),
                            "out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias})
    x, context, real = randn(2, 5, 32), randn(2, 7, 12), torch.arange(7) < torch.tensor([[7], [3]])
    close(ours(x, context, real), theirs(x, context, context, key_padding_mask=~real)[0])


def test_block_equals_torchs_pre_norm_layer():
    ours, theirs = Block(32, 4, qk_norm=False), nn.TransformerEncoderLayer(32, 4, 128, 0., nn.GELU("tanh"), batch_first=True, norm_first=True)
    names = {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "linear1", "mlp.fc2": "linear2", "attn.proj": "self_attn.out_proj"}
    state = {f"{b}.{p}": ours.state_dict()[f"{a}.{p}"] for a, b in names.items() for p in ("weight", "bias")}
    theirs.load_state_dict(state | {f"self_attn.in_proj_{p}": ours.state_dict()[f"attn.qkv.{p}"] for p in ("weight", "bias")})
    x = randn(2, 6, 32)
    close(ours(x), theirs(x))


def test_rope_equals_llamas():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k, places = randn(2, 4, 9, 16), randn(2, 4, 9, 16, seed=1), torch.arange(9.)
    angles = places[:, None] * 10_000 ** (-torch.arange(8) / 8)
    both = torch.cat([angles, angles], -1)[None]
    theirs = llama.apply_rotary_pos_emb(q, k, both.cos(), both.sin())
    close(rope(q, places[:, None]), theirs[0]); close(rope(k, places[:, None]), theirs[1])


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("width", [12, 16, 32])
def test_rope_sees_differences_only_and_keeps_lengths(axes, width):
    q, k, places = randn(2, 2, 7, width), randn(2, 2, 7, width, seed=1), 10 * randn(2, 7, axes, seed=2)
    scores = rope(q, places) @ rope(k, places).mT
    close(scores, rope(q, places + 5) @ rope(k, places + 5).mT, atol=1e-4, rtol=1e-4)
    assert (scores - q @ k.mT).abs().max() > .1
    close(rope(q, places).norm(dim=-1), q.norm(dim=-1))
    close(rope(q, places)[:1], rope(q[:1], places[0]))
    assert rope(q.bfloat16(), places).dtype == torch.bfloat16
    for a in range(axes):  # each axis matters
        assert (rope(q, places) - rope(q, places + torch.eye(3)[a, :axes])).abs().max() > .1


def test_sinusoid_equals_the_published_timestep_embedding():
    diffusers = pytest.importorskip("diffusers.models.embeddings")
    t = torch.tensor([0., 1., 250.5, 999.])
    close(sinusoid(t, 256), diffusers.get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0), atol=1e-4, rtol=1e-4)


def test_positions_are_row_major_distinct_and_padded():
    places = grid_positions(2, 3, 4)
    assert places.tolist() == [[f, h, w] for f in range(2) for h in range(3) for w in range(4)]
    table = sincos(places, 64)  # 3 axes of 20, and 4 zeros
    assert table.shape == (24, 64) and table[:, 60:].eq(0).all() and len(table.unique(dim=0)) == 24
    assert table[0].equal(table[0]) and sinusoid(torch.zeros(2, 5), 7).shape == (2, 5, 7)


def test_cache_in_any_portions_equals_no_cache():
    block, x, places = Block(32, 4, causal=True), randn(2, 12, 32), grid_positions(1, 3, 4)
    with torch.no_grad():
        whole = block(x, positions=places)
        for portions in ([1] * 12, [5] + [1] * 7, [4, 4, 4], [12]):
            cache = KVCache(12)
            parts = [block(a, positions=b, cache=cache) for a, b in zip(x.split(portions, 1), places.split(portions))]
            close(torch.cat(parts, 1), whole)
            assert cache.length == 12
    with pytest.raises(ValueError, match="capacity 12 cannot hold 13"): block(x[:, :1], cache=cache)
    assert cache.length == 12  # a refused token changes nothing


def test_cache_with_left_padded_prompts():
    block, x = Block(32, 4, causal=True), randn(1, 6, 32)
    padded, mask = torch.cat([randn(1, 3, 32, seed=1), x], 1), torch.tensor([[False] * 3 + [True] * 6])
    with torch.no_grad():
        cache = KVCache(9)
        first = block(padded[:, :7], mask=mask[:, :7], cache=cache)
        rest = [block(padded[:, i : i + 1], mask=mask[:, : i + 1], cache=cache) for i in (7, 8)]
        close(torch.cat([first, *rest], 1)[:, 3:], block(x))


@pytest.mark.parametrize("cross", [False, True])
def test_one_graph_without_breaks(cross):
    block, x = Block(32, 4, context_width=12 if cross else None, causal=True), randn(2, 8, 32)
    kwargs = dict(context=randn(2, 5, 12), context_mask=torch.arange(5) < torch.tensor([[5], [0]])) if cross else {}
    places = grid_positions(2, 2, 2)
    close(torch.compile(block, fullgraph=True, backend="aot_eager")(x, positions=places, **kwargs), block(x, positions=places, **kwargs))


def test_qk_norm_bounds_the_scores():
    x = 1000 * randn(2, 6, 32)
    for qk_norm, bounded in [(True, True), (False, False)]:
        layer = Attention(32, 4, qk_norm=qk_norm)
        q, k, _ = layer.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        largest = (layer.q_norm(q) @ layer.k_norm(k).mT).abs().max() / math.sqrt(8)
        assert (largest <= math.sqrt(8) + 1e-4) == bounded


def test_gated_mlp_equals_llamas():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP
    ours, theirs = MLP(48, gated=True), LlamaMLP(LlamaConfig(hidden_size=48, intermediate_size=128, num_attention_heads=4, hidden_act="silu", mlp_bias=True))
    value, gate = ours.fc1.weight.chunk(2)
    b, c = ours.fc1.bias.chunk(2)
    theirs.load_state_dict({"up_proj.weight": value, "up_proj.bias": b, "gate_proj.weight": gate, "gate_proj.bias": c, "down_proj.weight": ours.fc2.weight, "down_proj.bias": ours.fc2.bias})
    x = torch.randn(2, 5, 48, generator=generator(0))
    close(ours(x), theirs(x))


@pytest.mark.parametrize("longest", [100., 10_000.])
def test_attention_turns_by_the_wavelengths_it_is_given(longest):
    attn, x, places = Attention(32, 2, longest=longest), torch.randn(2, 6, 32, generator=generator(0)), grid_positions(1, 2, 3)
    q, k, v = attn.qkv(x).view(2, 6, 3, 2, 16).permute(2, 0, 3, 1, 4)
    q, k = (rope(norm(a), places, longest) for norm, a in ((attn.q_norm, q), (attn.k_norm, k)))
    close(attn(x, positions=places), attn.proj(attention(q, k, v).transpose(1, 2).reshape(2, 6, 32)))


def test_parameter_counts():
    d, c = 64, 48
    linear = lambda i, o: (i + 1) * o
    assert num_params(MLP(d)) == linear(d, 4 * d) + linear(4 * d, d)
    assert num_params(Attention(d, 4, bias=False, qk_norm=False)) == 4 * d * d
    self_attention = linear(d, 3 * d) + linear(d, d) + 2 * d // 4
    cross_attention = linear(d, d) + linear(c, 2 * d) + linear(d, d) + 2 * d // 4
    assert num_params(Block(d, 4)) == self_attention + num_params(MLP(d)) + 2 * 2 * d
    assert num_params(Block(d, 4, context_width=c)) == self_attention + cross_attention + num_params(MLP(d)) + 3 * 2 * d


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="width 32 does not divide by heads 5"): Attention(32, 5)
    with pytest.raises(ValueError, match="context is missing"): Block(32, 4, context_width=8)(randn(1, 2, 32))
    with pytest.raises(ValueError, match="context is given"): Attention(32, 4)(randn(1, 2, 32), randn(1, 2, 32))
