"The DiT: identity at birth, times and captions in every form, sizes, and the published weights."
import json, math, shutil
from dataclasses import asdict

import pytest
import torch
from torch.nn import functional as F

from minisora.core import num_params
from minisora.dit import SIZES, ClassDiT, DiT, DiTConfig, load_dit, patchify, positions, unpatchify
from minisora.flow import flow_loss, guide, sample_euler

TINY = dict(vocab=30, width=48, depth=2, heads=2, text_width=32, patch=(1, 2, 2))
close = lambda a, b, tol=1e-5: torch.testing.assert_close(a, b, atol=tol, rtol=tol)


def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def shaken(model, std=.1):
    g = torch.Generator().manual_seed(1)
    for p in model.parameters(): p.copy_(std * torch.randn(p.shape, generator=g))
    return model.eval()


@pytest.fixture(scope="module")
def tiny(): return shaken(DiT(4, **TINY))


@pytest.fixture(scope="module")
def batch(): return rand(2, 3, 4, 4, 8), torch.tensor([.2, .9]), torch.tensor([[5, 9, 2, 0, 0], [7, 7, 1, 29, 3]])


def test_patchify_by_hand():
    x = rand(2, 4, 3, 6, 8)
    tokens = patchify(x, (2, 3, 4))
    assert tokens.shape == (2, 2 * 2 * 2, 2 * 3 * 4 * 3)
    assert torch.equal(tokens[1, 5], x[1, 2:4, :, 0:3, 4:8].permute(0, 2, 3, 1).flatten())  # frame 1, row 0, column 1
    assert torch.equal(unpatchify(tokens, (2, 2, 2), (2, 3, 4)), x)


def test_positions_tell_all_places_apart():
    p = positions((5, 9, 9), 100)
    assert p.shape == (405, 100) and torch.cdist(p, p).fill_diagonal_(9.).min() > .05
    assert torch.equal(positions((2, 3, 3), 100)[9:12], p.view(5, 9, 9, 100)[1, 0, :3])  # a place does not depend on the grid


# --- birth

@pytest.mark.parametrize("predict", ["x0", "v"])
def test_zero_at_birth(predict, batch):
    torch.manual_seed(0)
    model, (x, t, ids) = DiT(4, **TINY, predict=predict), batch
    assert torch.equal(model(x, t, ids), torch.zeros_like(x) if predict == "v" else x / t[:, None, None, None, None])
    h, cond = rand(2, 24, 48), rand(2, 1, 48)
    mod = model.trunk.mod(cond).unflatten(-1, (-1, 48)).unbind(-2)
    for i, block in enumerate(model.trunk.blocks): assert torch.equal(block(h, mod[6 * i:6 * i + 6], rand(2, 5, 32), torch.ones(2, 5, dtype=torch.bool)), h)


def test_every_parameter_wakes_up(batch):
    torch.manual_seed(0)
    model, (x, t, ids) = DiT(4, **TINY), batch
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(4):
        optimizer.zero_grad(); flow_loss(model, x, t, rand(*x.shape, seed=2), text=ids).backward(); optimizer.step()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_learns_a_batch_with_its_captions():
    torch.manual_seed(0)
    model, x0, ids = DiT(4, **TINY), rand(4, 1, 4, 4, 4), torch.tensor([[1, 2], [2, 1], [3, 0], [4, 4]])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(80):
        loss = flow_loss(model, x0, torch.ones(4), rand(*x0.shape, seed=3), text=ids)  # at t = 1 only the caption tells them apart
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    assert loss < .1
    assert flow_loss(model, x0, torch.ones(4), rand(*x0.shape, seed=4), text=ids.flip(0)) > 1


# --- times and captions

def test_times_in_every_form(tiny, batch):
    x, t, ids = batch
    v = tiny(x, t, ids)
    assert v.shape == x.shape and v.dtype == torch.float32
    close(tiny(x, t[:, None].expand(2, 3), ids), v)
    close(tiny(x, t[:, None].expand(2, 24), ids), v)
    close(tiny(x, .4, ids), tiny(x, torch.tensor([.4, .4]), ids))
    frames = torch.tensor([[0., .5, .5], [.1, .2, .3]])
    close(tiny(x, frames, ids), tiny(x, frames.repeat_interleave(8, 1), ids))  # 8 tokens a frame
    assert (tiny(x, frames, ids) - tiny(x, .5, ids)).abs().max() > .01


def test_frames_of_one_patch_share_their_time(batch):
    model, x = shaken(DiT(4, width=48, depth=1, patch=(2, 2, 2))), rand(2, 4, 4, 4, 4)
    close(model(x, torch.tensor([[.1, .3, .6, .8]] * 2)), model(x, torch.tensor([[.2, .2, .7, .7]] * 2)))


def test_x0_becomes_velocity(batch):
    x, t, ids = batch
    v = shaken(DiT(4, **TINY, predict="v"))(x, t, ids)
    x0 = shaken(DiT(4, **TINY, t_min=.5))(x, t, ids)
    close(x0[0], (x[0] - v[0]) / .5), close(x0[1], (x[1] - v[1]) / .9)  # the same network, read as x0


def test_captions_padding_and_neighbours(tiny, batch):
    x, t, ids = batch
    v = tiny(x, t, ids)
    close(tiny(x, t, F.pad(ids, (0, 11))), v)
    close(tiny(x[:1], t[:1], ids[:1, :3]), v[:1])
    close(tiny(x, t, torch.where(ids > 0, ids, 17), ids > 0), v)  # a mask is believed
    close(tiny(x, t, 0 * ids), tiny(x, t))  # padding only: no caption
    assert tiny(x, t, 0 * ids).isfinite().all()
    for other in (None, ids.flip(1), torch.where(ids == 9, 8, ids)): assert (tiny(x, t, other) - v)[0].abs().max() > 1e-3


def test_cross_attention_sees_the_words(tiny, batch):
    "With the pooled path shut, the words still matter: they come in by two doors."
    x, t, ids = batch
    one, two = shaken(DiT(4, **TINY)), shaken(DiT(4, **TINY))
    one.pool.weight.data.zero_()
    for block in two.trunk.blocks: block.cross.proj.weight.data.zero_()
    for model in (one, two): assert (model(x, t, ids) - model(x, t, ids.roll(1, 0))).abs().max() > 1e-4


def test_any_grid_and_sampler(tiny):
    text = torch.tensor([[3, 4]])
    for f, h, w in ((1, 4, 4), (5, 2, 10)):
        noise = rand(1, f, 4, h, w)
        assert sample_euler(guide(tiny, 2., dict(text=0 * text)), noise, 3, text=text).shape == noise.shape


def test_rotary_places_and_gates(batch):
    "Both keep every form of time, padding and grid; the first is a matter of distance and of no parameters."
    net = DiT(3, width=48, depth=2, heads=2, patch=(1, 2, 2), rope=True, gated=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters(): p.normal_(std=.1)
        x = torch.randn(2, 2, 3, 6, 8)
        v = net(x, .4)
        torch.testing.assert_close(net(x, torch.full((2, 2), .4)), v, atol=1e-5, rtol=1e-5)
        plain = DiT(net.config, rope=False)
        plain.load_state_dict(net.state_dict())
        assert (plain(x, .4) - v).abs().max() > 1e-4
    assert abs(num_params(net) / num_params(DiT(net.config, gated=False)) - 1) < .01
    assert net(torch.randn(1, 3, 3, 4, 12), .4).shape == (1, 3, 3, 4, 12)


def test_without_captions(batch):
    x, t, ids = batch
    model = DiT(4, width=48, depth=1)
    assert model(x, t).shape == x.shape and model.trunk.blocks[0].cross is None
    with pytest.raises(ValueError, match="vocab=0"): model(x, t, ids)


def test_errors(tiny, batch):
    x, t, ids = batch
    for bad, say in ((x[:, 0], r"x has shape"), (x[:, :, :3], "expected .b f 4 h w"), (x[..., :7], r"multiples of \(1, 2, 2\)")):
        with pytest.raises(ValueError, match=say): tiny(bad, t, ids)
    for bad in (t[:1], torch.rand(2, 5), torch.rand(2, 3, 1)):
        with pytest.raises(ValueError, match="t has shape"): tiny(x, bad, ids)
    for fields, say in ((dict(predict="eps"), "predict is 'eps'"), (dict(patch=(2, 2)), "patch"), (dict(t_min=0), "t_min"), (dict(width=64, heads=3), "heads")):
        with pytest.raises(ValueError, match=say): DiT(4, **fields)


def test_bfloat16_is_near(tiny, batch):
    x, t, ids = batch
    with torch.autocast("cpu", torch.bfloat16): v = tiny(x, t, ids)
    assert v.dtype == torch.float32 and (v - tiny(x, t, ids)).norm() < .05 * v.norm()


def test_golden(tiny, batch):
    "A change of these numbers changes what every saved checkpoint means."
    v = tiny(*batch)
    close(v.flatten()[[0, 100, 400, -1]], torch.tensor([-2.0006, -14.5289, -0.1911, -1.7157]), 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_is_eager(backend, batch):
    "In one graph, without a break: with a caption, times by frame and real code; and without."
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))): pytest.skip("no C++ compiler")
    torch._dynamo.reset()
    model, (x, t, ids) = shaken(DiT(4, **{**TINY, "depth": 1})), batch
    args = (x, t) if backend == "eager" else (x, torch.tensor([[0., .5, .5]] * 2), ids)
    close(torch.compile(model, fullgraph=True, backend=backend)(*args), model(*args), 1e-4)
    torch._dynamo.reset()


# --- sizes

def test_config():
    c = DiTConfig.sized(6, channels=16, vocab=300, patch=[1, 2, 2])
    assert (c.width, c.heads, c.text_width, c.patch) == (192, 4, 128, (1, 2, 2))
    assert DiTConfig(**json.loads(json.dumps(asdict(c)))) == c
    assert DiT(**asdict(c)).config == DiT(c).config == DiT.sized(6, channels=16, vocab=300, patch=(1, 2, 2)).config == c
    assert DiT(c, predict="v").config.predict == "v"
    for depth in range(2, 29):
        s = DiTConfig.sized(depth, channels=4)
        assert s.width == 32 * depth and s.width % s.heads == 0 and 32 <= s.width // s.heads <= 96


def counted(depth, width, numbers, vocab=0, text=0, text_depth=1, heads=1):
    "Parameters of a DiT by the formula."
    linear = lambda i, o: i * o + o
    block = linear(width, 3 * width) + linear(width, width) + linear(width, 4 * width) + linear(4 * width, width) + 2 * (width // heads)
    n = linear(numbers, width) + linear(256, width) + linear(width, width) + linear(width, (6 * depth + 2) * width) + linear(width, numbers)
    if vocab:
        block += 2 * linear(width, width) - linear(width, width) + linear(text, 2 * width) + linear(width, width) + 2 * (width // heads)
        th = min((h for h in range(1, text + 1) if text % h == 0), key=lambda h: abs(h - text / 32))
        n += vocab * text + text + 2 * text + text * width  # pool has no bias
        n += text_depth * (12 * text**2 + 13 * text + 2 * (text // th))
    return n + depth * block


@pytest.mark.parametrize("depth", [4, 6, 12])
def test_our_sizes(depth):
    with torch.device("meta"): model = DiT.sized(depth, channels=16, vocab=300)
    c = model.config
    assert num_params(model) == counted(depth, 32 * depth, 16, 300, c.text_width, 1, c.heads)
    with torch.device("meta"): assert num_params(DiT.sized(depth, channels=3, patch=(1, 4, 4))) == counted(depth, 32 * depth, 48, heads=c.heads)


def test_published_sizes():
    def count(name, **fields):
        with torch.device("meta"): return num_params(ClassDiT(**SIZES[name], **fields))
    assert count("DiT-XL") == 675_129_632  # the paper's XL/2 at 256x256, its places counted
    assert [round(count(name) / 1e6) for name in SIZES] == [33, 131, 458, 675]
    for s in SIZES.values(): assert s["width"] % s["heads"] == 0


# --- the published weights

def published(depth, width, patch, channels, side, classes, sigma, seed=0):
    "Random weights under the keys of facebookresearch/DiT."
    g = torch.Generator().manual_seed(seed)
    out = patch * patch * channels * (1 + sigma)
    shapes = {"x_embedder.proj.weight": (width, channels, patch, patch), "x_embedder.proj.bias": (width,), "pos_embed": (1, (side // patch)**2, width),
              "t_embedder.mlp.0.weight": (width, 256), "t_embedder.mlp.0.bias": (width,), "t_embedder.mlp.2.weight": (width, width), "t_embedder.mlp.2.bias": (width,),
              "y_embedder.embedding_table.weight": (classes, width), "final_layer.linear.weight": (out, width), "final_layer.linear.bias": (out,),
              "final_layer.adaLN_modulation.1.weight": (2 * width, width), "final_layer.adaLN_modulation.1.bias": (2 * width,)}
    for i in range(depth):
        for name, o, n in (("attn.qkv", 3 * width, width), ("attn.proj", width, width), ("mlp.fc1", 4 * width, width), ("mlp.fc2", width, 4 * width), ("adaLN_modulation.1", 6 * width, width)):
            shapes |= {f"blocks.{i}.{name}.weight": (o, n), f"blocks.{i}.{name}.bias": (o,)}
    return {k: torch.randn(s, generator=g) * (.5 if "pos" in k or "table" in k else s[-1]**-.5 if len(s) > 1 else .1) for k, s in shapes.items()}


def paper(w, x, t, y, heads):
    "The paper's equations, one sample, one head, one patch at a time: nothing shared with the library."
    p, d = w["x_embedder.proj.weight"].shape[-1], w["pos_embed"].shape[-1]
    depth = 1 + max(int(k.split(".")[1]) for k in w if k.startswith("blocks"))
    linear = lambda name, a: a @ w[name + ".weight"].T + w[name + ".bias"]
    silu = lambda a: a / (1 + (-a).exp())
    gelu = lambda a: a / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + .044715 * a**3)))
    norm = lambda a: (a - a.mean(-1, keepdim=True)) / (a.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    pictures = []
    for xb, tb, yb in zip(x, t.tolist(), y.tolist()):
        side = xb.shape[-1] // p
        cells = [(r, c) for r in range(side) for c in range(side)]
        h = torch.stack([(w["x_embedder.proj.weight"] * xb[:, r * p:r * p + p, c * p:c * p + p]).sum((1, 2, 3)) + w["x_embedder.proj.bias"] for r, c in cells]) + w["pos_embed"][0]
        angles = [tb * 10000**(-i / 128) for i in range(128)]
        code = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        cond = silu(linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", code))) + w["y_embedder.embedding_table.weight"][yb])
        for i in range(depth):
            b1, s1, g1, b2, s2, g2 = linear(f"blocks.{i}.adaLN_modulation.1", cond).split(d)
            q, k, v = linear(f"blocks.{i}.attn.qkv", norm(h) * (1 + s1) + b1).split(d, -1)
            e = d // heads
            parts = [((q[:, j:j + e] @ k[:, j:j + e].T) / math.sqrt(e)).softmax(-1) @ v[:, j:j + e] for j in range(0, d, e)]
            h = h + g1 * linear(f"blocks.{i}.attn.proj", torch.cat(parts, -1))
            h = h + g2 * linear(f"blocks.{i}.mlp.fc2", gelu(linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + s2) + b2)))
        shift, scale = linear("final_layer.adaLN_modulation.1", cond).split(d)
        rows = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
        picture = torch.zeros(rows.shape[-1] // p**2, xb.shape[-1], xb.shape[-1])
        for row, (r, c) in zip(rows, cells): picture[:, r * p:r * p + p, c * p:c * p + p] = row.view(p, p, -1).permute(2, 0, 1)
        pictures.append(picture)
    return torch.stack(pictures)


def diffusers_model(w, heads, side, learned):
    from diffusers import DiTTransformer2DModel
    d, channels, p, _ = w["x_embedder.proj.weight"].shape
    depth = 1 + max(int(k.split(".")[1]) for k in w if k.startswith("blocks"))
    theirs = {"pos_embed.proj.weight": w["x_embedder.proj.weight"], "pos_embed.proj.bias": w["x_embedder.proj.bias"]}
    for kind in ("weight", "bias"):
        theirs |= {f"proj_out_1.{kind}": w[f"final_layer.adaLN_modulation.1.{kind}"], f"proj_out_2.{kind}": w[f"final_layer.linear.{kind}"]}
        for i in range(depth):
            block, ours = f"transformer_blocks.{i}", f"blocks.{i}"
            for n, k in zip("qkv", w[f"{ours}.attn.qkv.{kind}"].chunk(3)): theirs[f"{block}.attn1.to_{n}.{kind}"] = k
            theirs |= {f"{block}.attn1.to_out.0.{kind}": w[f"{ours}.attn.proj.{kind}"], f"{block}.ff.net.0.proj.{kind}": w[f"{ours}.mlp.fc1.{kind}"],
                       f"{block}.ff.net.2.{kind}": w[f"{ours}.mlp.fc2.{kind}"], f"{block}.norm1.linear.{kind}": w[f"{ours}.adaLN_modulation.1.{kind}"],
                       f"{block}.norm1.emb.timestep_embedder.linear_1.{kind}": w[f"t_embedder.mlp.0.{kind}"],
                       f"{block}.norm1.emb.timestep_embedder.linear_2.{kind}": w[f"t_embedder.mlp.2.{kind}"],
                       f"{block}.norm1.emb.class_embedder.embedding_table.weight": w["y_embedder.embedding_table.weight"]}
    model = DiTTransformer2DModel(num_attention_heads=heads, attention_head_dim=d // heads, in_channels=channels, out_channels=channels * (1 + learned), num_layers=depth,
                                  sample_size=side, patch_size=p, num_embeds_ada_norm=len(w["y_embedder.embedding_table.weight"]) - 1, norm_eps=1e-6).eval()
    missing, unexpected = model.load_state_dict(theirs, strict=False)
    assert not unexpected and set(missing) <= {"pos_embed.pos_embed"}
    model.pos_embed.pos_embed.copy_(w["pos_embed"])
    for block in model.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0  # diffusers' 1 is not what the weights were trained with
    return model


CASES = [dict(depth=2, width=48, patch=2, channels=4, side=8, classes=11, sigma=True), dict(depth=3, width=96, patch=4, channels=3, side=16, classes=7, sigma=False)]


@pytest.mark.parametrize("case", CASES, ids=["sigma", "plain"])
@torch.no_grad()
def test_published_weights_give_the_published_outputs(case):
    pytest.importorskip("diffusers")
    w, heads = published(**case), case["width"] // 16
    x, t, y = rand(3, case["channels"], case["side"], case["side"], seed=5), torch.tensor([0, 500, 999]), torch.tensor([0, 3, case["classes"] - 1])
    model = load_dit(w, heads=heads)
    got = model(x, t, y)
    assert got.shape == (3, case["channels"] * (1 + case["sigma"]), case["side"], case["side"]) and got.std() > .1
    close(got, paper(w, x, t, y, heads), 1e-4)
    close(got, diffusers_model(w, heads, case["side"], case["sigma"])(x, t, y).sample, 1e-4)
    back = model.published()
    assert back.keys() == w.keys() and all(torch.equal(back[k], w[k]) for k in w)


def test_loaded_weights_train():
    model = load_dit(published(**CASES[0]), heads=3)
    model(rand(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([1, 2])).square().mean().backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == {"pos_embed"}


def test_heads_by_the_papers_table():
    small = published(depth=12, width=384, patch=8, channels=4, side=16, classes=3, sigma=True)
    assert load_dit(small).trunk.blocks[0].attn.heads == 6
    with pytest.raises(ValueError, match="heads is None, and depth 2 with width 48"): load_dit(published(**CASES[0]))


def test_foreign_weights_are_named():
    w = published(**CASES[0])
    for key in ("x_embedder.proj.weight", "pos_embed", "blocks.1.mlp.fc2.bias", "final_layer.adaLN_modulation.1.weight", "t_embedder.mlp.2.bias"):
        with pytest.raises(ValueError, match=f"lacks {key}"): load_dit({k: v for k, v in w.items() if k != key}, heads=3)
        bad = torch.zeros(5) if w[key].ndim > 1 else torch.zeros(5, 5)
        with pytest.raises(ValueError, match=f"{key} has shape"): load_dit({**w, key: bad}, heads=3)
    with pytest.raises(ValueError, match="has head.weight"): load_dit({**w, "head.weight": torch.zeros(2)}, heads=3)
    with pytest.raises(ValueError, match="pos_embed has shape"): load_dit({**w, "pos_embed": torch.zeros(1, 15, 48)}, heads=3)
    with pytest.raises(ValueError, match="x has shape"): load_dit(w, heads=3)(rand(1, 4, 8, 4), torch.zeros(1), torch.zeros(1, dtype=torch.long))
